"""What the README prints runs, from top to bottom, as it is printed."""

import doctest
import re
import shlex
import sys
import types
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
from swap_models import FAMILIES, NanoGPT

from gptkernels import cli
from gptkernels.models import GPT, GPTConfig

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = [(kind, text) for kind, text in re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)]
HUB = {"openai-community/gpt2": "GPT-2", "EleutherAI/gpt-neo-125m": "GPT-Neo", "mistralai/Mistral-7B-v0.1": "Mistral"}


@pytest.fixture
def no_network(monkeypatch):
    """Small random models under the names of those on the hub."""
    transformers = pytest.importorskip("transformers")
    known = {family.name: family for family in FAMILIES}

    def from_pretrained(name, attn_implementation=None, **options):
        model = known[HUB[name]].make()
        if attn_implementation:
            model.set_attn_implementation(attn_implementation)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(GPT, "from_hf", lambda name: GPT(GPTConfig(layers=1, width=32, heads=2)))
    nano = types.ModuleType("model")
    nano.GPT, nano.GPTConfig = lambda config: NanoGPT(), object
    monkeypatch.setitem(sys.modules, "model", nano)


def test_python_from_top_to_bottom(no_network):
    torch.manual_seed(0)
    namespace, ran = {}, 0
    for kind, text in BLOCKS:
        if kind != "python":
            continue
        if text.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(text, namespace, "README", None, 0)
            assert doctest.DocTestRunner().run(test).failed == 0
        else:
            exec(compile(text, "README.md", "exec"), namespace)
        ran += 1
    assert ran >= 6
    report = namespace["report"]
    assert report.counts() == {"attention": 3, "norm": 7, "mlp": 3}
    assert "window 256" in str(report), "the last snippet asks for a band on every other layer"


def commands() -> list[list[str]]:
    """Every gptkernels command in blocks and in the text"""
    found = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
    found += re.findall(r"`((?:gptkernels|torchrun|python) [^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
    lines = []
    for text in found:
        for part in re.split(r"&&|\|", text):
            words = shlex.split(part, comments=True)
            if "gptkernels" in words and words[0] not in ("pip", "git"):
                lines.append(words[words.index("gptkernels") + 1 :])
    return lines


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_understood(words):
    assert words, "a command is missing"
    name, *rest = words
    if name in ("--version", "--help"):
        return
    command = import_module(cli.COMMANDS[name][0], "gptkernels")
    parser = ArgumentParser()
    command.add_arguments(parser)
    rest = [word for word in rest if word != "..."]
    parser.parse_args(rest)


def test_the_flags_it_names_are_there():
    """Of train, bench, profile, check and compare: `--flag` anywhere in the text"""
    known = set()
    for name, (module, _) in cli.COMMANDS.items():
        parser = ArgumentParser(name)
        import_module(module, "gptkernels").add_arguments(parser)
        known |= {flag for action in parser._actions for flag in action.option_strings}
    known |= {"--nproc-per-node", "--out", "--device", "--version", "--standalone"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT))
    assert named <= known, named - known


def test_train_and_generate_as_printed(tmp_path, monkeypatch, capsys):
    """The example with fewer steps."""
    block = next(text for kind, text in BLOCKS if "gptkernels train --model tiny" in text)
    make, train, generate = block.strip().splitlines()
    assert make == "cat $(git ls-files '*.py') > source.txt"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source.txt").write_text("def attention(q, k, v):\n    return softmax(q @ k.T) @ v\n" * 60)
    words = shlex.split(train)[1:]
    words[words.index("--steps") + 1] = "4"
    assert cli.main(words) == 0
    capsys.readouterr()
    assert cli.main(shlex.split(generate)[1:]) == 0
    assert capsys.readouterr().out.startswith("def attention(")
