"""What --parallel says."""

from argparse import ArgumentTypeError

import pytest

from gptkernels.failures import UsageError
from gptkernels.parallel import mesh


@pytest.mark.parametrize(
    ("text", "world", "kind", "sizes"),
    [
        ("none", 1, "none", (1, 1, 1)),
        ("ddp", 6, "ddp", (6, 1, 1)),
        ("fsdp,cp=4", 8, "fsdp", (2, 4, 1)),
        ("fsdp,cp=4", 4, "fsdp", (1, 4, 1)),
        ("ddp,tp=2,cp=2", 8, "ddp", (2, 2, 2)),
        ("cp=4", 4, "ddp", (1, 4, 1)),
        ("tp=2", 2, "ddp", (1, 1, 2)),
        ("cp", 8, "ddp", (1, 8, 1)),
        ("fsdp,cp", 8, "fsdp", (1, 8, 1)),
        ("cp,tp=2", 8, "ddp", (1, 4, 2)),
        ("fsdp", 1, "fsdp", (1, 1, 1)),
    ],
)
def test_what_fits(text, world, kind, sizes):
    split = mesh.parse(text).fitted(world)
    assert (split.kind, split.sizes()) == (kind, sizes)


@pytest.mark.parametrize(
    ("text", "world", "message"),
    [
        ("fsdp,cp=4", 6, "--parallel fsdp,cp=4 needs a multiple of 4 processes, not 6"),
        ("cp=4", 2, "--parallel cp=4 needs 4 processes, not 2"),
        (
            "cp=4",
            8,
            "--parallel cp=4 needs 4 processes, not 8; ddp,cp=4 and fsdp,cp=4 give the rest data of their own",
        ),
        ("cp,tp=2", 5, "--parallel cp,tp=2 needs a multiple of 2 processes, not 5"),
        ("none", 2, "--parallel none needs 1 processes, not 2"),
    ],
)
def test_what_does_not_fit(text, world, message):
    with pytest.raises(UsageError) as error:
        mesh.parse(text).fitted(world)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "text", ["", "dp", "cp=0", "cp=", "cp=x", "fsdp,ddp", "none,cp=2", "cp=2,cp=4", "fsdp,pp=2", "cp=-1", "cp,cp"]
)
def test_what_is_not_accepted(text):
    with pytest.raises(ArgumentTypeError, match=r"must be none, ddp or fsdp, then cp=N and tp=N.*not "):
        mesh.accepted(text)


def test_one_of_two_without_a_number():
    with pytest.raises(ArgumentTypeError, match="must leave one of cp and tp without a number"):
        mesh.accepted("cp,tp")
