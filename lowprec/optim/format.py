"""What is stored for a parameter: the fields, their dtypes and their bytes (kernels/lowprec_kernels/adamw)."""

from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from lowprec_kernels.adamw.reference import BLOCK, SCALE_OF
from torch import Tensor

from lowprec.errors import UserError

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
MASTERS = ("split", "fp32", "none")


@dataclass(frozen=True)
class Field:
    """One stored array: an item for every ``block`` elements."""

    name: str
    dtype: torch.dtype
    block: int = 1

    def nbytes(self, numel: int) -> int:
        return -(-numel // self.block) * self.dtype.itemsize


@dataclass(frozen=True)
class StateFormat:
    """How the states of a parameter of ``param_dtype`` are kept. Hashable: parameters of one format share chunks."""

    param_dtype: torch.dtype
    state_dtype: str
    master: str
    amsgrad: bool

    @classmethod
    def of(cls, name: str, param: Tensor, state_dtype: str, master: str, amsgrad: bool) -> "StateFormat":
        """The format of one parameter. Raises UserError where the parameter cannot have it."""
        if state_dtype not in STATE_DTYPES:
            raise UserError(
                f"optimizer.state_dtype={state_dtype!r} is unknown: choose one of {', '.join(STATE_DTYPES)}."
            )
        if master not in MASTERS:
            raise UserError(f"optimizer.master={master!r} is unknown: choose one of {', '.join(MASTERS)}.")
        if param.dtype == torch.float32:
            return cls(param.dtype, state_dtype, "none", amsgrad)  # the weight is its own master
        if param.dtype == torch.bfloat16 or (param.dtype == torch.float16 and master == "fp32"):
            return cls(param.dtype, state_dtype, master, amsgrad)
        raise UserError(
            f"Parameter {name} has dtype {param.dtype}, which AdamW with master={master!r} cannot update: use "
            "torch.float32 or torch.bfloat16 weights (model.dtype), or master='fp32' for torch.float16."
        )

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        dtype = STATE_DTYPES[self.state_dtype]
        fields = []
        if self.master == "fp32":
            fields.append(Field("master", torch.float32))
        elif self.master == "split":
            fields.append(Field("residual", torch.int16))
        moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * self.amsgrad
        for name in moments:
            fields.append(Field(name, torch.uint8 if dtype == torch.int8 and name != "exp_avg" else dtype))
        if self.state_dtype == "int8":
            fields += [Field(SCALE_OF[name], torch.float32, BLOCK) for name in moments]
        return tuple(fields)

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of state per weight: what a step reads, and what it writes."""
        return sum(field.dtype.itemsize / field.block for field in self.fields)

    def nbytes(self, numel: int) -> int:
        return sum(field.nbytes(numel) for field in self.fields)

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"param_dtype": str(self.param_dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, values: dict) -> "StateFormat":
        return cls(**values | {"param_dtype": getattr(torch, values["param_dtype"])})
