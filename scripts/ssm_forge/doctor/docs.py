"""``docs/doctor.md``, made from the rules."""

from __future__ import annotations

from ssm_forge.doctor.rules import Rule, load

_HEAD = """\
# Doctor

Why an environment's kernels don't work, and the command that mends it: for any environment, made by conda, pixi, uv,
pip or anything else. Nothing is changed.

| command | |
| --- | --- |
| `./run doctor ENV` | examine the environment in the folder `ENV`, else the active one, else the one installed last |
| `./run doctor --python EXE` | the same by its interpreter |
| `./run doctor --log FILE` | recognise the failure in a log; `-` is standard input |
| `./run doctor --report FILE` | write what to attach to an issue: no secrets, no user name, no home folder |
| `./run doctor --json` | for programs |
| `./run doctor --network` | also which channels and registries answer |
| `./run doctor --wait 60` | more time: imports that have not ended after 4.5 s are said to be open |
| `./run doctor --write-pyz FILE` | write it as one file |

The one file, `ssm-forge-doctor.pyz`, needs Python 3.8 or newer and nothing else. Run it with the environment's own
Python, where nothing may be installed:

```sh
./run doctor --write-pyz ssm-forge-doctor.pyz
python3 ssm-forge-doctor.pyz
python3 ssm-forge-doctor.pyz --log build.log
```

It looks at files first: packages, shared libraries (symbols, versions, GPU code), variables, driver, toolkits,
caches. Then it imports the kernels in another process, and with a GPU uses each once. Exit code: 0 where nothing is
broken, 9 where something is, 1 for a log whose failure is not known, 2 for an environment or log that is not there.

An *error* breaks something, a *warning* is wrong and works, a *hint* is told beside an error only. The most probable
cause comes first. An undefined symbol is told with its readable name and the releases of torch that have it
(`scripts/ssm_forge/doctor/torch_symbols.json`, which `./run bump symbols` brings up to date).

## Adding a failure

One entry in `scripts/ssm_forge/doctor/rules.json`; its place in the file is its rank. `match` holds patterns (Python's,
for one kind of quote: `'`) that must all be found near each other, `needles` plain texts of which one is in every such
log, `see` an example, which is its test. Without `match` only a probe can find it. Then `./run doctor --write-docs`.
"""

_CHINESE = """\
## 中文说明

`./run doctor ENV --lang zh` 用中文解释；`LANG` 为中文时是默认。
"""


def text() -> str:
    """The whole document, in Markdown."""
    rules = list(load().values())
    parts = [_HEAD, "## What it knows\n", *map(_section, rules), _CHINESE, *map(_in_chinese, rules)]
    return "\n".join(parts) + "\n"


def _section(rule: Rule) -> str:
    lines = [f"### {rule.code}", "", *_folded(f"{rule.cause['en']} ({rule.severity})"), ""]
    lines += [*_folded(f"Fix: {rule.fix['en']}"), ""]
    if rule.command:
        lines += ["```sh", _command_for_anyone(rule.command), "```", ""]
    if rule.see:
        lines += ["```text", *_folded(rule.see), "```", ""]
    origin = [f"Seen in: {', '.join(rule.sources)}."] if rule.sources else []
    origin += [f"Since: {rule.since}."] if rule.since != "1" else []
    return "\n".join([*lines, *_folded(" ".join(origin)), ""] if origin else lines)


def _command_for_anyone(command: str) -> str:
    rebuild = "./run install-mamba --prefix ENV"
    names = {"{rebuild}": rebuild, "{python}": "python", "{env}": "ENV", "{name}": "PACKAGE"}
    for name, value in names.items():
        command = command.replace(name, value)
    return command


def _folded(text: str) -> list[str]:
    """Lines of at most 110 characters; what is longer goes on in the next line."""
    folded = []
    for line in text.splitlines():
        while len(line) > 110:
            cut = line.rfind(" ", 0, 110)
            cut = cut if cut > 40 else 110
            folded.append(line[:cut])
            line = line[cut:].lstrip()
        folded.append(line)
    return folded


def _in_chinese(rule: Rule) -> str:
    return f"- **{rule.code}** {rule.cause['zh']}\n  {rule.fix['zh']}"
