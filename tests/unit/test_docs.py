"""What the documentation promises exists: tasks, options, files, settings; and both READMEs say the same."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ssm_forge import cli
from ssm_forge.bundle import main as bundle_main
from ssm_forge.manifest import variants

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
DOCUMENTS = (*READMES, *sorted((ROOT / "docs").glob("*.md")))
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

_FENCE = re.compile(r"^```.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_TASK = re.compile(r"(?:^|(?<=[\s(]))\./run (?!TASK)([^\n]*)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_SETTING = re.compile(r"\bSSM_FORGE_[A-Z_]*[A-Z]\b")

# Tasks that hand everything after their own options to another program.
_PASSING_ON = {"python", "shell", "test"}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def fences(text: str) -> list[str]:
    """Fenced blocks, and blocks that are code by their indentation."""
    return [*_FENCE.findall(text), *re.findall(r"^(?: {4}.*\n)+", _FENCE.sub("", text), re.MULTILINE)]


def spans(text: str) -> list[str]:
    """Inline code; in a table a bar is written ``\\|``."""
    return [span.replace("\\|", "|") for span in _SPAN.findall(_FENCE.sub("", text))]


def commands(text: str) -> Iterator[list[str]]:
    """The words after every ``./run``, without comments, prompts and what follows ``&&`` or ``|``."""
    for code in [*fences(text), *spans(text)]:
        for found in _TASK.findall(code):
            # Descriptions stand after two blanks or a '#'; the output of a run quotes commands, too.
            line = re.split(r"\s#| {2,}|, or ", found)[0].replace("[", "").replace("]", "")
            words = shlex.split(line.rstrip(":"))
            yield words[: next((i for i, word in enumerate(words) if word in ("&&", "|", ">")), len(words))]


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that ``words`` names, and the words that are left.

    Raises:
        LookupError: when there is no such task.
    """
    command: click.Command = cli.tasks
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        inner = command.get_command(click.Context(command), rest[0])
        if inner is None:
            raise LookupError(f"there is no task ./run {' '.join(words)}")
        command, rest = inner, rest[1:]
    return command, rest


def options(command: click.Command) -> dict[str, click.Option]:
    return {name: p for p in command.params if isinstance(p, click.Option) for name in (*p.opts, *p.secondary_opts)}


def every_command(group: click.Group) -> Iterator[click.Command]:
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield command
        if isinstance(command, click.Group):
            yield from every_command(command)


def problems(words: list[str]) -> list[str]:
    """What is wrong with one documented command."""
    try:
        command, rest = resolve(words)
    except LookupError as error:
        return [str(error)]
    known = options(command)
    found = []
    for index, word in enumerate(rest):
        if word == "--":
            break  # What follows is for another program.
        if not word.startswith("-"):
            if words[0] in _PASSING_ON and (index == 0 or not takes_value(known, rest[index - 1])):
                break
            continue
        name, equals, value = word.partition("=")
        if name not in known:
            if words[0] in _PASSING_ON:
                break
            found.append(f"./run {' '.join(words)}: no option {name}")
            continue
        kind = known[name].type
        value = value if equals else (rest[index + 1] if takes_value(known, name) and index + 1 < len(rest) else "")
        if isinstance(kind, click.Choice) and value:
            wrong = set(value.split("|")) - set(kind.choices)
            found += [f"./run {' '.join(words)}: {name} takes no {choice}" for choice in sorted(wrong)]
        if name == "--variant" and value.islower() and value not in variants.load(ROOT / "recipes/variants.yaml").names:
            found.append(f"./run {' '.join(words)}: no variant {value}")
    return found


def takes_value(known: dict[str, click.Option], name: str) -> bool:
    return name in known and not known[name].is_flag and not known[name].count


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_task_and_option_exists(path: Path) -> None:
    found = [problem for words in commands(text_of(path)) for problem in problems(words)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", READMES, ids=NAMES[:2])
def test_the_readme_names_every_task_and_every_option_of_the_main_one(path: Path) -> None:
    text = text_of(path)
    named = {words[0] for words in commands(text) if words}
    assert not set(cli.COMMANDS) - named
    install, _ = resolve(["install-mamba"])
    assert not set(options(install)) - set(_OPTION.findall(text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_option_on_its_own_belongs_to_some_task(path: Path) -> None:
    known = {name for command in every_command(cli.tasks) for name in options(command)}
    # The bundle is a program of its own.
    known |= set(_OPTION.findall(Path(bundle_main.__file__).read_text(encoding="utf-8")))
    known |= {
        name for path in (ROOT / "scripts/ssm_forge/kernels").glob("*.py") for name in _OPTION.findall(text_of(path))
    }
    alone = {name for code in spans(text_of(path)) if code.startswith("--") for name in _OPTION.findall(code)}
    assert not alone - known


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_relative_link_resolves(path: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", text_of(path))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(text_of(target))):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_setting_is_read_somewhere(path: Path) -> None:
    sources = [ROOT / "run", *(ROOT / "scripts").rglob("*.py"), *(ROOT / "recipes").rglob("*.yaml")]
    code = "\n".join(text_of(source) for source in sources)
    assert not set(_SETTING.findall(text_of(path))) - set(_SETTING.findall(code))


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_lines_are_short(path: Path) -> None:
    long = [number for number, line in enumerate(text_of(path).splitlines(), 1) if len(line) > 120]
    assert not long


def test_the_variants_in_the_table_are_those_of_the_matrix() -> None:
    rows = re.findall(r"^\| `(cu\d+)` \| (\w+) \| ([\d.]+) \| ([\d.]+) \|.*$", text_of(ROOT / "docs/variants.md"), re.M)
    told = {(name, source): (".".join(torch.split(".")[:2]), triton) for name, source, torch, triton in rows}
    matrix = variants.load(ROOT / "recipes/variants.yaml")
    assert told == {(v.name, v.source): (v.torch, v.row["triton"]) for v in matrix.variants}


def test_both_readmes_have_the_same_sections_and_tables() -> None:
    english, chinese = (_FENCE.sub("", text_of(path)) for path in READMES)
    for shape in (r"^(#+) ", r"^(\|).*\|$", r"^(- )"):
        assert len(re.findall(shape, english, re.M)) == len(re.findall(shape, chinese, re.M)), shape
    assert re.findall(r"^(#+) ", english, re.M) == re.findall(r"^(#+) ", chinese, re.M)


def test_both_readmes_have_the_same_code() -> None:
    english, chinese = map(text_of, READMES)
    assert fences(english) == fences(chinese)
    assert sorted(map(str, commands(english))) == sorted(map(str, commands(chinese)))
    # Two sentences may quote a name a different number of times; neither may quote what the other lacks.
    assert set(spans(english)) == set(spans(chinese))


@pytest.mark.parametrize(
    "wrong",
    [
        ["instal-mamba"],
        ["install-mamba", "--gpu", "9.0"],
        ["install-mamba", "--source", "conda|pip"],
        ["install-mamba", "--variant", "cu999"],
        ["channel", "polish"],
        ["export", "cu118", "--format=rpm"],
    ],
)
def test_the_checks_see_what_does_not_exist(wrong: list[str]) -> None:
    assert problems(wrong)


def test_commands_are_found_in_every_form() -> None:
    fenced = "```sh\n$ ./run verify --full  # all\n./run serve\n```\n"
    inline = "`./run pack cu118 [--with-tools]` and `x`\n\n    ./run bundle  here\n"
    found = [["verify", "--full"], ["serve"], ["bundle"], ["pack", "cu118", "--with-tools"]]
    assert list(commands(fenced + inline)) == found
