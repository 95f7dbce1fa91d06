"""The batch on which schemes that choose by measurement judge their noise."""

import torch

from lowprec.data import PreparedData
from lowprec.data.collate import Inputs, collate
from lowprec.data.stream import Stream
from lowprec.prepare import Wrap


def calibration_batch(options: Wrap, data: PreparedData, pad_token_id: int, device: torch.device) -> Inputs | None:
    """The first ``options.calibration_samples`` training rows (held-out ones of a stream) as one padded batch.

    Returns:
        Keyword arguments of the model, on ``device``; None where no samples are asked for. Packed rows are taken as one
        sample each, which is all the same to the noise of products.
    """
    if options.calibration_samples == 0:
        return None
    rows = data.evaluation if isinstance(data.train, Stream) else data.train
    items = [rows[index] for index in range(min(options.calibration_samples, len(rows)))]
    batch = collate(items, pad_token_id, attention=None)
    return {name: value.to(device) for name, value in batch.items()}
