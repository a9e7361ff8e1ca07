"""A mistyped word is answered with the one that was meant, and with nothing where none is near."""

from __future__ import annotations

from pathlib import Path

import pytest

from conda_channel import demo_channel, make_package
from front_door import assert_one_line_error, run
from ssm_forge.base.errors import UsageError, did_you_mean
from ssm_forge.base.paths import workspace
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import variants
from ssm_forge.publish import send as publish
from ssm_forge.serve.tokens import TokenStore
from ssm_forge.solve import lock


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("instal-mamba",), "install-mamba"),
        (("variant",), "variants"),
        (("Verify",), "verify"),
        (("env", "craete", "cu130"), "create"),
        (("channel", "chek"), "check"),
        (("bench", "kernel"), "kernels"),
        (("install-mamba", "--varient", "cu130"), "--variant"),
        (("verify", "--prefx", "x"), "--prefix"),
        (("install-mamba", "--source", "brigde"), "bridge"),
        (("export", "cu130", "--format", "cyclonedex"), "cyclonedx"),
        (("bump", "brigde"), "bridge"),
        (("install-mamba", "--variant", "cu13", "--dry-run"), "cu130"),
        (("env", "create", "CU130", "--locked"), "cu130"),
    ],
)
def test_the_command_line_names_what_was_meant(words: tuple[str, ...], meant: str) -> None:
    done = run(*words)
    assert_one_line_error(done, 2, f"Did you mean '{meant}'?")
    assert done.stderr.count("Did you mean") == 1


@pytest.mark.parametrize("words", [("xyzzy",), ("env", "xyzzy"), ("install-mamba", "--source", "xyzzy")])
def test_nothing_is_guessed_where_nothing_is_near(words: tuple[str, ...]) -> None:
    assert_one_line_error(run(*words), 2, "--help'")
    assert "Did you mean" not in run(*words).stderr


def test_names_of_other_things(tmp_path: Path) -> None:
    place = workspace()
    store = TokenStore(tmp_path / "tokens.json")
    store.add("laptop", "read", 1)
    channel = demo_channel(tmp_path)
    make_package(channel, "mamba-ssm", {"x": "x"})
    for meant, ask in {
        "cu130": lambda: variants.load(place.variants).get("cu13O", "bridge"),
        "cu118": lambda: lock.environment(place.lock, "cu18"),
        "cu129": lambda: manifest.load(place.manifest).environment("cu1299"),
        "laptop": lambda: store.revoke("labtop"),
        "mamba-ssm": lambda: publish.select(["mamba-smm"], channel),
    }.items():
        with pytest.raises(UsageError, match=f"Did you mean '{meant}'"):
            ask()


def test_one_word_or_none() -> None:
    assert did_you_mean("cu13", ["cu118", "cu130"]) == "Did you mean 'cu130'? "
    assert did_you_mean("xyzzy", ["cu118", "cu130"]) == ""
    assert did_you_mean("cu13", []) == ""
