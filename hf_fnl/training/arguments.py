"""Training arguments: which optimizer runs, and what is decayed as a product."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_fnl.attention.selectors import KINDS, PARTS, Selector
from hf_fnl.optim.frobenius_decay import MODES
from hf_fnl.optim.groups import FACTOR_DECAYS
from hf_fnl.training.profiling import STEPS_BEFORE

OUR_OPTIMIZERS = ("flambe", "lamb")

_STOCK = TrainingArguments.__dataclass_fields__
_COUNTED = {"True": "all", "true": "all", "False": "no", "false": "no"}  # as Transformers takes truth values


@dataclass
class FLAMBeTrainingArguments(TrainingArguments):
    """Transformers' training arguments, with FLAMBe as the optimizer and Frobenius decay of products.

    The defaults are those of Khodak et al. 2021, Sec. 6: FLAMBe decays the output-value products of the attention and
    applies ordinary decay elsewhere, none on biases and LayerNorm.

    With ``dense_steps`` a model is trained as it is for some steps and then factorized (Kamalakara et al. 2022,
    Sec. 3.4), by what ``FLAMBeTrainer(factorize=...)`` is given. Until then its layers are no products and get ordinary
    decay; the products of attentions are decayed all along. Frobenius decay shrinks a singular value in proportion to
    its own size, ordinary decay of factors all of them alike. Trained matrices have larger ones than drawn matrices, so
    that a ``frobenius_coefficient`` that suits products trained from the start can be far too large after the switch.

    Raises:
        ValueError: If an option is unknown or two options contradict each other.
    """

    optim: str = field(
        default="flambe", metadata={"help": "flambe, lamb, or any optimizer of Transformers (adamw_torch, sgd, ...)."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Coefficient of ordinary decay of every matrix."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Added to the root of the second moment."})
    frobenius_decay: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Kinds of products under Frobenius decay ({', '.join(KINDS)}), each everywhere or in one part of "
            f"the model ({', '.join(PARTS)}), as in qk ov:encoder; or none. "
            "Default: ov with flambe, none with other optimizers."
        },
    )
    frobenius_coefficient: float | None = field(
        default=None, metadata={"help": "Coefficient of Frobenius decay. Default: weight_decay."}
    )
    frobenius_mode: str = field(
        default="decoupled",
        metadata={"help": f"How other optimizers than flambe apply Frobenius decay: {', '.join(MODES)}."},
    )
    factor_decay: str = field(
        default="weight",
        metadata={
            "help": "Decay of factorized layers without Frobenius decay: weight, as of other matrices; crs, scaled by "
            "their compression rate (Gray et al. 2019); or none."
        },
    )
    decay_vectors: bool = field(default=False, metadata={"help": "Decay biases and normalizations as matrices are."})
    warmup_start: float = field(
        default=0.0,
        metadata={
            "help": "With lr_scheduler_type=inverse_sqrt: share of the learning rate at which the warm-up begins; 1: "
            "the rate is constant for warmup_steps (Khodak et al. 2021)."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log the mean of other losses for one that is not finite, and train on."}
    )
    # In Transformers one word each to a parser, though one takes several and the other is no truth value afterwards.
    report_to: list[str] = field(default_factory=lambda: ["none"], metadata=_STOCK["report_to"].metadata)
    include_num_input_tokens_seen: str = field(default="no", metadata=_STOCK["include_num_input_tokens_seen"].metadata)
    diagnostics_steps: int = field(
        default=0, metadata={"help": "Log norms, effective ranks and step sizes of products every so many steps."}
    )
    profile_steps: int = field(
        default=0,
        metadata={
            "help": "Profile so many steps after the first three: profile.txt and profile_trace.json in output_dir."
        },
    )
    dense_steps: int = field(default=0, metadata={"help": "Steps before the model is factorized; 0: none."})
    low_rank_lr_scale: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate from then on (Kamalakara et al. 2022: 0.5)."}
    )

    def __post_init__(self) -> None:
        # Lists, which one name may stand for.
        for name in ("frobenius_decay", "label_names", "include_for_metrics", "report_to"):
            if isinstance(given := getattr(self, name, None), str):
                setattr(self, name, given.replace(",", " ").split())
        counted = str(self.include_num_input_tokens_seen)
        self.include_num_input_tokens_seen = _COUNTED.get(counted, counted)
        if self.include_num_input_tokens_seen not in ("all", "non_padding", "no"):
            raise ValueError(f"include_num_input_tokens_seen must be all, non_padding or no, got {counted!r}")
        chosen = str(getattr(self.optim, "value", self.optim))
        known = {*OUR_OPTIMIZERS, *(name.value for name in OptimizerNames)}
        if chosen not in known:
            raise ValueError(f"optim must be flambe, lamb or one of Transformers' optimizers, got {chosen!r}")
        # Transformers accepts only its own names here; ours is put back when it has checked the rest.
        self.optim = OptimizerNames.ADAMW_TORCH if chosen in OUR_OPTIMIZERS else chosen
        is_ours = self.accelerator_config is None
        super().__post_init__()
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # torch warns where there is nothing to pin for
        if is_ours and self.dataloader_pin_memory:
            self.accelerator_config.non_blocking = True  # or each batch would wait until the GPU is done with the last
        if chosen in OUR_OPTIMIZERS:
            self.optim = chosen
        self.max_grad_norm = self.max_grad_norm or 0.0  # type: ignore[has-type]  # None is no clipping, as in Lamb
        self._check_processes()
        self._check_decay()
        self._check_steps()
        self._check_rate()
        self._check_dense_steps()
        self._check_checkpoints()

    def _check_processes(self) -> None:
        started = int(os.environ.get("WORLD_SIZE") or 1)
        if started > 1 and self.world_size == 1:
            remedy = "" if torch.accelerator.is_available() else ": there is no GPU here, so set use_cpu=true"
            raise ValueError(f"the launcher started {started} processes, and each would train its own model{remedy}")

    def _check_decay(self) -> None:
        if self.frobenius_decay is None:
            self.frobenius_decay = ["ov"] if self.optim == "flambe" else []
        if self.frobenius_decay == ["none"]:
            self.frobenius_decay = []
        for selector in self.frobenius_decay:
            Selector.parse(selector, "frobenius_decay")
        if self.optim == "flambe" and not self.frobenius_decay:
            raise ValueError("optim=flambe without frobenius_decay is LAMB: set optim=lamb, or name a kind of product")
        if self.frobenius_mode not in MODES:
            raise ValueError(f"frobenius_mode must be one of {', '.join(MODES)}, got {self.frobenius_mode!r}")
        if self.optim == "flambe" and self.frobenius_mode != "decoupled":
            raise ValueError(
                f"optim=flambe applies its decay inside the LAMB update; frobenius_mode={self.frobenius_mode} is for "
                "the other optimizers"
            )
        if self.frobenius_coefficient is not None and self.frobenius_coefficient < 0:
            raise ValueError(f"frobenius_coefficient must not be negative, got {self.frobenius_coefficient}")
        if self.factor_decay not in FACTOR_DECAYS:
            raise ValueError(f"factor_decay must be one of {', '.join(FACTOR_DECAYS)}, got {self.factor_decay!r}")

    def _check_steps(self) -> None:
        for name in ("diagnostics_steps", "profile_steps", "dense_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.profile_steps and 0 < self.max_steps <= STEPS_BEFORE:
            raise ValueError(f"profile_steps begin after step {STEPS_BEFORE}, and max_steps is {self.max_steps}")

    def _check_rate(self) -> None:
        kind = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if self.warmup_start and (kind != "inverse_sqrt" or not 0 <= self.warmup_start <= 1):
            raise ValueError(
                "warmup_start must be in [0, 1] and is for lr_scheduler_type=inverse_sqrt, got "
                f"{self.warmup_start} with {kind}"
            )
        if self.warmup_start and not self.warmup_steps:
            raise ValueError(f"warmup_start={self.warmup_start} needs warmup_steps, after which the rate goes down")

    def _check_dense_steps(self) -> None:
        if 0 < self.max_steps <= self.dense_steps:
            raise ValueError(f"dense_steps must be below max_steps={self.max_steps}, got {self.dense_steps}")
        if not self.low_rank_lr_scale > 0:
            raise ValueError(f"low_rank_lr_scale must be positive, got {self.low_rank_lr_scale}")
        if self.low_rank_lr_scale != 1 and not self.has_dense_phase:
            raise ValueError(f"low_rank_lr_scale={self.low_rank_lr_scale} needs dense_steps, after which it begins")

    def _check_checkpoints(self) -> None:
        if self.save_on_each_node and int(os.environ.get("LOCAL_WORLD_SIZE") or self.world_size) < self.world_size:
            raise ValueError(
                "save_on_each_node=true would leave each machine with the parts of its own processes: write to one "
                "output_dir that all machines share"
            )

    @property
    def has_dense_phase(self) -> bool:
        """Whether the model is dense at first."""
        return self.dense_steps > 0

    @property
    def product_decay(self) -> float:
        """The coefficient of Frobenius decay."""
        return self.weight_decay if self.frobenius_coefficient is None else self.frobenius_coefficient
