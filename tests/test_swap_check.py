"""gptkernels check --hf: on the right model, on a wrong one, and on what is no model."""

import json

import pytest
from swap_models import FAMILIES, made
from torch import nn

import gptkernels as gk
from gptkernels import cli
from gptkernels.swap import check, masks

pytest.importorskip("transformers")


@pytest.fixture(params=["GPT-2", "Mistral", "BERT", "ViT"])
def folder(request, tmp_path):
    model = made(next(each for each in FAMILIES if each.name == request.param))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("weights", ["saved", "random"])
def test_right(folder, weights, tmp_path, capsys):
    path = folder if weights == "saved" else folder / "config.json"
    results = tmp_path / "results.json"
    assert cli.main(["check", "--hf", str(path), "--device", "cpu", "--seed", "0", "--json", str(results)]) == 0
    shown = capsys.readouterr().out
    for part in ("gptkernels.attention", "gradients, the worst of", "kept for backward", "before", "after"):
        assert part in shown
    assert "WRONG" not in shown
    found = json.loads(results.read_text())
    assert all(0 <= finding["share"] <= 1 for finding in found["findings"])
    assert len({finding["share"] for finding in found["findings"]} - {0.0}) > 3
    assert found["costs"]["after"]["kept_mib"] < found["costs"]["before"]["kept_mib"]


def test_wrong(tmp_path, capsys, monkeypatch):
    """A window of one key too many is found."""
    made(next(each for each in FAMILIES if each.name == "Mistral")).save_pretrained(tmp_path)
    attend = masks.attend

    def wrong(q, k, v, mask, **options):
        return attend(q, k, v, mask._replace(window=mask.window + 1), **options)

    monkeypatch.setattr(masks, "attend", wrong)
    assert cli.main(["check", "--hf", str(tmp_path), "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_what_is_no_model(tmp_path, capsys):
    assert cli.main(["check", "--hf", str(tmp_path / "nothing")]) == 2
    assert "gptkernels check: --hf" in capsys.readouterr().err


def test_a_model_that_is_left_as_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "load", lambda _: nn.Sequential(gk.nn.LayerNorm(4)))
    assert cli.main(["check", "--hf", "a model"]) == 2
    assert "Sequential has none" in capsys.readouterr().err
