"""A checkpoint is whole or not there, every bit of it counts, and it gives back what was put in."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from test_training import OPTIONS, counting_text, model

from gptkernels.models import checkpoint
from gptkernels.models.training import Trainer


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, {"step": 1})

    def torn(failure, tensors, staged, metadata):
        Path(staged).write_bytes(b"half of it")
        raise failure

    full = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    for failure, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (full, OSError)):
        monkeypatch.setattr(safetensors.torch, "save_file", partial(torn, failure))
        with pytest.raises(seen):
            checkpoint.save(path, {"step": 2})
        assert [file.name for file in tmp_path.iterdir()] == [checkpoint.NAME]
        assert checkpoint.load(tmp_path)["step"] == 1


def test_every_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    trainer = Trainer(model(), counting_text(), replace(OPTIONS, steps=1), out=tmp_path)
    list(trainer.train())
    path = tmp_path / checkpoint.NAME
    whole = path.read_bytes()
    checkpoint.load(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = np.random.default_rng(0)
    # In the header, whose every byte counts, and in the tensors.
    places = [*generator.integers(0, header, 40), *generator.integers(header, len(whole), 20)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))) as seen:
            checkpoint.load(path)
        if place >= header:
            assert re.search(r"is damaged: the tensor (model|optimizer)\.\S+ is not", str(seen.value))
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint.load(path)


def test_checkpoints_keep_everything(tmp_path):
    state = {
        "model": {"a.b": torch.randn(3, 5).bfloat16(), "c": torch.tensor(2.5)},
        "optimizer": {
            "state": {"a.b": {"step": torch.tensor(7.0), "exp_avg": torch.randn(3, 5).mT}},
            "param_groups": [{"params": ["a.b"], "lr": 1e-3, "betas": [0.9, 0.95], "fused": True, "foreach": None}],
        },
        "step": 3,
        "options": {"learning_rate": 0.1 + 0.2},
    }
    checkpoint.save(tmp_path / checkpoint.NAME, state)
    loaded = checkpoint.load(tmp_path)
    assert loaded["options"] == state["options"]
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for name, x in state["model"].items():
        torch.testing.assert_close(loaded["model"][name], x, rtol=0, atol=0)
    for name, x in state["optimizer"]["state"]["a.b"].items():
        torch.testing.assert_close(loaded["optimizer"]["state"]["a.b"][name], x, rtol=0, atol=0)
