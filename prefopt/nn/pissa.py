"""PiSSA (Meng et al. 2024, arXiv 2404.02948): A and B start at the largest singular values of W.

W = W_res + s B0 A0, with B0 A0 from the r largest ones; what is trained is W_res + s B A.
W_res is never formed. As W_res + s B A = W + s (B A - B0 A0), the frozen weight stays W, and

    s (B A - B0 A0) = s [B, B - B0] [A - A0; A0]        [out, 2r] [2r, in]

is exactly 0 at the start. So the base with the adapter off is the base, 4-bit weights stay as they
are, nothing has to be restored, and the small differences keep all their digits in 16 bits.
"""

import torch
from torch import Tensor


@torch.no_grad()
def principal(W: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r], float32, with s B0 A0 the best approximation of W of rank r.

    W [out, in]; r <= min(out, in). Each singular value is halved between the two in the logarithm.
    """
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    # A pair of singular vectors has two signs; the same one on every machine.
    U = U[:, :r]
    signs = U.gather(0, U.abs().argmax(0, keepdim=True))[0].sign()
    root = (S[:r] / scale).sqrt() * signs
    return (root[:, None] * Vh[:r]).contiguous(), (U * root).contiguous()


def change(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """[A - A0; A0] and [B, B - B0], whose product is B A - B0 A0; with the gradients of A and B."""
    return torch.cat([A - A0, A0]), torch.cat([B, B - B0], 1)


def exported(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """[A; A0] and [B, -B0]: the same product from the tensors themselves, none of them rounded."""
    return torch.cat([A, A0]), torch.cat([B, -B0], 1)
