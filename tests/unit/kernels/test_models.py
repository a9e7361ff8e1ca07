"""Models of transformers with and without the kernels: how two results are judged, and how packages are hidden."""

from __future__ import annotations

import importlib.util

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here; ./run test runs this in an installed env")

from ssm_forge.kernels import models  # noqa: E402
from ssm_forge.kernels.models import MODELS, judge  # noqa: E402


def result(**changes: object) -> dict[str, object]:
    """What a worker saves of a model."""
    return {"logits": torch.ones(2, 3), "dweight": torch.full((4,), 2.0), **changes}


def status(got: object, own: object, name: str = "mamba") -> str:
    return judge(name, MODELS[name], got, own).status


def test_equal_results_pass_and_others_fail() -> None:
    assert status(result(), result()) == "pass"
    assert status(result(logits=torch.full((2, 3), 1 + 2e-5)), result()) == "fail"
    assert status(result(dweight=torch.full((4,), 2 + 1e-4)), result()) == "fail"
    assert status(result(dweight=torch.full((4,), torch.nan)), result()) == "fail"
    assert status(result(dweight=torch.full((4,), 2.0)[:3]), result()) == "fail"


def test_tf32_is_allowed_where_the_kernels_multiply_so() -> None:
    off = result(logits=torch.full((2, 3), 1 + 1e-3), dweight=torch.full((4,), 2 + 4e-3))
    assert status(off, result(), "mamba2") == "pass"
    assert status(result(dweight=torch.full((4,), 2.1)), result(), "mamba2") == "fail"


def test_a_missing_gradient_is_no_pass() -> None:
    got = result()
    del got["dweight"]
    assert status(got, result()) == "fail"
    assert status(result(), got) == "fail"


def test_what_transformers_can_not_build_is_not_run_and_what_raises_fails() -> None:
    check = judge("mamba", MODELS["mamba"], "not built: ValueError: no such model", result())
    assert (check.status, "no such model" in check.detail) == ("not-run", True)
    assert status("raised RuntimeError: illegal access", result()) == "fail"
    assert status(result(), "raised RuntimeError: out of memory") == "fail"
    assert status("raised nothing, and called no kernel", result()) == "fail"


def test_a_hidden_package_can_be_neither_imported_nor_found() -> None:
    import json.tool as once_imported

    with models._hidden(("json.tool", "wave")):
        for name in ("json.tool", "wave"):
            assert importlib.util.find_spec(name) is None
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(name)
    assert importlib.import_module("json.tool") is once_imported
    assert importlib.import_module("wave").__name__ == "wave"


def test_falcon_mamba_is_compared_where_it_can_be_and_the_rest_is_said() -> None:
    assert not MODELS["falcon_mamba"].training
    assert models.FALCON_IN_TRAINING.status == "not-run"
    assert "after its projection" in models.FALCON_IN_TRAINING.detail
