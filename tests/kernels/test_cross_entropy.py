"""The loss's kernel against fp64: no less exact than torch in the same dtype."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from qlora_lightning.kernels import cross_entropy, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def exact(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of their sum in fp64, by autograd."""
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none")
    losses.sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def rows(number: int, columns: int, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits up to ``scale`` in size and targets, every third ignored; the second row is sure of its target, the third of another."""
    torch.manual_seed(0)
    logits = (torch.rand(number, columns, dtype=torch.float64) * 2 - 1) * scale
    targets = torch.randint(columns, (number,))
    targets[0] = columns - 1
    logits[1, targets[1]] = logits[2, targets[2] - 1] = scale + 20
    targets[3::3] = reference.IGNORED
    return logits.to(DEVICE, dtype), targets.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns, scale", [(1000, 50), (1000, 1), (32003, 50), (32000, 5), (70001, 10), (7, 3)])
def test_loss_and_gradient(columns: int, scale: float, dtype: torch.dtype) -> None:
    logits, targets = rows(5, columns, dtype, scale)
    wanted_losses, wanted = exact(logits, targets)
    plain, got = logits.clone(), logits.clone()
    plain_losses, losses = reference.cross_entropy(plain, targets), cross_entropy.cross_entropy(got, targets)
    assert losses.dtype == torch.float32 and (losses[3] == 0) and not got[3].any()
    # Beside twice torch's own error: a hardware exponential (2^-22 of its result), and a sum near 1 in another order (a few times 2^-24).
    for mine, plainly, rightly in ((losses, plain_losses, wanted_losses), (got, plain, wanted)):
        error = (plainly.double() - rightly).abs().amax(-1, keepdim=True)
        assert ((mine.double() - rightly).abs() <= 2 * error + 2**-21 * rightly.abs() + 2**-21).all()


def test_rows_apart_and_their_neighbours() -> None:
    logits, targets = rows(4, 1000, torch.bfloat16, 10)
    wide = torch.full((4, 1024), 3.0, dtype=torch.bfloat16, device=DEVICE)
    wide[:, :1000] = logits
    losses = cross_entropy.cross_entropy(wide[:, :1000], targets)
    assert torch.equal(losses, cross_entropy.cross_entropy(logits, targets))
    assert torch.equal(wide[:, :1000], logits) and (wide[:, 1000:] == 3).all()


def test_logits_of_minus_infinity() -> None:
    """Masked-out words: no loss of precision, no gradient, even where a thread sees nothing else."""
    logits, targets = rows(3, 1000, torch.float32, 5)
    logits[:, 100:] = -torch.inf
    targets[:] = 7
    wanted_losses, wanted = exact(logits, targets)
    losses = cross_entropy.cross_entropy(logits, targets)
    torch.testing.assert_close(losses.double(), wanted_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", [reference.cross_entropy, cross_entropy.cross_entropy], ids=["reference", "triton"])
def test_an_ignored_row_is_zero_whatever_it_holds(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    logits = torch.full((1, 1000), torch.nan, device=DEVICE)
    losses = function(logits, torch.tensor([reference.IGNORED], device=DEVICE))
    assert losses.item() == 0 and not logits.any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device, found none")
def test_entries_beyond_2_to_31() -> None:
    logits = torch.randn(16400, 151936, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(151936, (16400,), device=DEVICE)
    ends = slice(0, None, 1639)
    plain = logits[ends].clone()
    plain_losses = reference.cross_entropy(plain, targets[ends])
    losses = cross_entropy.cross_entropy(logits, targets)
    torch.testing.assert_close(losses[ends], plain_losses, rtol=2**-20, atol=2**-20)
    torch.testing.assert_close(logits[ends], plain, rtol=2**-7, atol=2**-20)
