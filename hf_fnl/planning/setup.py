"""How a model is trained: engine, processes, batch, precision, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

ENGINES = ("ddp", "zero1", "zero2", "hsdp", "fsdp2", "zero3")  # from the most memory per GPU to the least
DTYPES = {"fp32": 4, "bf16": 2}
OPTIMIZERS = ("flambe", "lamb", "adamw_torch")
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A training run on ``gpus`` GPUs.

    Args:
        engine: One of :data:`ENGINES`, as the configurations in ``run_scripts/launch`` set it up.
        gpus: All GPUs of the run.
        gpus_per_node: GPUs of a machine; HSDP shards within a machine and replicates over machines.
        batch_size: Sequences of a GPU in one forward pass.
        sequence_length: Tokens of a sequence.
        accumulation: Forward passes of a step.
        dtype: ``"fp32"``, or ``"bf16"`` for mixed precision: autocast under DDP and FSDP2, a model in bf16 under ZeRO.
        optimizer: One of :data:`OPTIMIZERS`.
        frobenius_decay: Kinds of products under Frobenius decay; those of ``flambe`` if the optimizer is another.
        offload: Keep the state of the optimizer in the memory of the host; under FSDP2 parameters and gradients too.
        checkpointing: Compute activations of a layer again in the backward pass.
        labelled_share: Share of the positions that are predicted, where a model computes logits at those only.

    Raises:
        ValueError: If a number is below one, a name is unknown, or the engine does not fit the number of GPUs.
    """

    engine: str = "ddp"
    gpus: int = 1
    gpus_per_node: int = 8
    batch_size: int = 8
    sequence_length: int = 128
    accumulation: int = 1
    dtype: str = "bf16"
    optimizer: str = "flambe"
    frobenius_decay: tuple[str, ...] = ("ov",)
    offload: bool = False
    checkpointing: bool = False
    labelled_share: float = 0.15

    def __post_init__(self) -> None:
        for name, allowed in {"engine": ENGINES, "dtype": DTYPES, "optimizer": OPTIMIZERS}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("gpus", "gpus_per_node", "batch_size", "sequence_length", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.labelled_share <= 1:
            raise ValueError(f"labelled_share must be in (0, 1], got {self.labelled_share}")
        if self.engine == "hsdp" and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"hsdp needs whole machines: gpus={self.gpus} is not a multiple of gpus_per_node={self.gpus_per_node}"
            )
        if self.offload and self.engine == "ddp":
            raise ValueError("ddp keeps everything on the GPU: offload needs another engine, such as zero2")

    @property
    def shards(self) -> int:
        """Processes among which a tensor of the optimizer is divided."""
        if self.engine == "ddp":
            return 1
        return min(self.gpus, self.gpus_per_node) if self.engine == "hsdp" else self.gpus

    @property
    def replicas(self) -> int:
        """Copies of such a division."""
        return self.gpus // self.shards

    @property
    def is_fsdp(self) -> bool:
        """Whether parameters are DTensors."""
        return self.engine in ("fsdp2", "hsdp")

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs."""
        return self.engine.startswith("zero")

    @property
    def width(self) -> int:
        """Bytes of a number that an engine gathers or reduces; DDP reduces gradients of fp32 parameters."""
        return FP32 if self.engine == "ddp" else DTYPES[self.dtype]
