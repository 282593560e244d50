"""LiNeS: a factor that grows linearly with the depth (methods.md 3.1; arXiv 2410.17146).

From:  sums of magnitudes over the whole model, by a pass over all updates.
To:    the factor of every tensor, when it is written.
"""


def first_factor(updates_norm: float, merged_norm: float, num_experts: int) -> float:
    """Factor a of the first block, and of what is outside the blocks.

    It gives the merged update the magnitude of the mean of the experts' updates.

    Args:
        updates_norm: Sum of magnitudes of the sum of all experts' updates, ||sum D_t||_1.
        merged_norm: Sum of magnitudes of the merged update, ||D||_1.
        num_experts: Number T of experts.

    Returns:
        ||sum D_t||_1 / (T ||D||_1); 0.0 where nothing was merged.
    """
    return updates_norm / (num_experts * merged_norm) if merged_norm else 0.0


def factor(first: float, slope: float, depth: float) -> float:
    """A + b * depth, with depth 0 in the first block and outside the blocks, 1 in the last."""
    return first + slope * depth
