"""The held-out part, chosen by content."""

import hashlib

import numpy as np

from lowprec.errors import UserError


def held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Mark the samples to hold out.

    The distinct keys are put in the order of their hashes, and the first ``fraction`` of them (at least one) are held
    out with all their samples. So equal contents stay together, and neither the order of the files nor the seed of the
    run matters: runs of different seeds are judged on the same samples.

    Args:
        keys: ``[samples]``, equal for samples that must stay together.
        fraction: Of the distinct keys, above 0 and below 1.

    Returns:
        bool ``[samples]``.

    Raises:
        UserError: fewer than two distinct keys, so that no split exists.
    """
    distinct, which = np.unique(keys, return_inverse=True)
    if len(distinct) < 2:
        raise UserError(
            f"data.path holds {len(keys)} samples with {len(distinct)} distinct content, so none can be held out for "
            "evaluation; add data, or set data.eval_path."
        )
    number = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    hashes = np.array([hashlib.sha256(f"held out {key}".encode()).hexdigest() for key in distinct])
    chosen = np.zeros(len(distinct), dtype=bool)
    chosen[np.argsort(hashes)[:number]] = True
    return chosen[which]
