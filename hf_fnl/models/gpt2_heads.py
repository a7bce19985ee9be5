"""Every head that Transformers has for GPT-2, on the factorized backbone, and their registration."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as stock

from hf_fnl.layers import FactorizedLinear
from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.models.base import is_initialized
from hf_fnl.models.forwards import extends
from hf_fnl.models.gpt2 import FactorizedGPT2Config, FactorizedGPT2Model, FactorizedGPT2PreTrainedModel
from hf_fnl.models.tied_rows import tied_inputs
from hf_fnl.models.vocabulary import TiedVocabulary, causal_loss, head_loss, is_plain, tied_factors, vocabulary_layer


class _WithLMHead(TiedVocabulary, FactorizedGPT2PreTrainedModel):
    """A head with vocabulary logits, whose matrix is tied to the word embedding, factor by factor."""

    lm_head: Any

    def post_init(self) -> None:
        """Put our output matrix in the place of the stock one, the first time, then initialize the model."""
        if not is_initialized(self):
            rank, method = self.config.embedding_rank, self.config.ranks.method("embedding")
            with init.no_init_weights():
                self.lm_head = vocabulary_layer(self.lm_head, rank, method)
            tied = {"lm_head.weight": "transformer.wte.weight"}
            self._tied_weights_keys = tied_factors(tied, rank is not None)
        super().post_init()


class FactorizedGPT2LMHeadModel(_WithLMHead, stock.GPT2LMHeadModel):
    """Left-to-right language modelling."""

    dense_class = stock.GPT2LMHeadModel
    accepts_loss_kwargs = True

    def __init__(self, config: FactorizedGPT2Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.loss_type = "ForCausalLM"  # Transformers looks for it in the class's name and warns, which breaks a graph
        self.transformer = FactorizedGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @extends(stock.GPT2LMHeadModel.forward, ForCausalLMLoss)
    def forward(
        self,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int | None = None,
        return_logits: bool | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """As the stock model, with a loss that can do without logits of ``(batch, length, vocab_size)``.

        Args:
            labels: ``(batch, length)``, not shifted, -100 where nothing is to be predicted.
            shift_labels: ``(batch, length)``, the label of each position, in the place of ``labels``.
            num_items_in_batch: Labelled positions in the whole batch, as the Trainer passes it.
            ignore_index: In the place of -100.
            return_logits: Whether the output has logits. Default: unless there are labels and the model trains with
                ``fused_loss``, its own loss function and an ``lm_head`` that computes no more than its class does.
        """
        options: dict[str, Any] = {"num_items_in_batch": num_items_in_batch}
        if ignore_index is not None:
            options["ignore_index"] = ignore_index
        has_labels = labels is not None or shift_labels is not None
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        is_fused = has_labels and keeps_all and not return_logits and self._has_plain_loss()
        if not is_fused or (return_logits is None and not (self.training and self.config.fused_loss)):
            outputs = super().forward(logits_to_keep=logits_to_keep, **inputs)
            return causal_loss(self, outputs, labels, shift_labels, **options)
        if inputs.get("input_ids") is not None and inputs.get("inputs_embeds") is None:
            input_ids, embeds, table = tied_inputs(self.transformer.wte, self.lm_head, inputs["input_ids"])
            inputs = {**inputs, "input_ids": input_ids, "inputs_embeds": embeds}
        else:
            table = None
        outputs = self.transformer(**inputs)
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=options.get("ignore_index", IGNORE_INDEX))[..., 1:]
        loss = head_loss(self.lm_head, outputs.last_hidden_state, shift_labels, table=table, **options)
        kept = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithCrossAttentions(loss=loss, **kept)

    def _has_plain_loss(self) -> bool:
        return self.loss_function is ForCausalLMLoss and is_plain(self.lm_head, nn.Linear, FactorizedLinear)


class FactorizedGPT2DoubleHeadsModel(_WithLMHead, stock.GPT2DoubleHeadsModel):
    """Language modelling and multiple choice."""

    dense_class = stock.GPT2DoubleHeadsModel

    def __init__(self, config: FactorizedGPT2Config) -> None:
        PreTrainedModel.__init__(self, config)
        config.num_labels = 1
        self.transformer = FactorizedGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.multiple_choice_head = stock.GPT2SequenceSummary(config)
        self.post_init()


class FactorizedGPT2ForSequenceClassification(FactorizedGPT2PreTrainedModel, stock.GPT2ForSequenceClassification):
    """Classification or regression of a sequence by its last token."""

    dense_class = stock.GPT2ForSequenceClassification

    def __init__(self, config: FactorizedGPT2Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = FactorizedGPT2Model(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()


class FactorizedGPT2ForTokenClassification(FactorizedGPT2PreTrainedModel, stock.GPT2ForTokenClassification):
    """Classification of every token."""

    dense_class = stock.GPT2ForTokenClassification

    def __init__(self, config: FactorizedGPT2Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = FactorizedGPT2Model(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.n_embd, config.num_labels)
        self.post_init()


class FactorizedGPT2ForQuestionAnswering(FactorizedGPT2PreTrainedModel, stock.GPT2ForQuestionAnswering):
    """Extractive question answering."""

    dense_class = stock.GPT2ForQuestionAnswering

    def __init__(self, config: FactorizedGPT2Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = FactorizedGPT2Model(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()


def _classifier_dropout(config: FactorizedGPT2Config) -> float:
    """The rate that the stock model takes, from fields that a GPT-2 configuration need not have."""
    rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
    return next((rate for rate in rates if rate is not None), 0.1)


AutoConfig.register(FactorizedGPT2Config.model_type, FactorizedGPT2Config, exist_ok=True)
AutoTokenizer.register(FactorizedGPT2Config, tokenizer_class=GPT2Tokenizer, exist_ok=True)
for _auto, _model in (
    (AutoModel, FactorizedGPT2Model),
    (AutoModelForPreTraining, FactorizedGPT2LMHeadModel),
    (AutoModelForCausalLM, FactorizedGPT2LMHeadModel),
    (AutoModelForSequenceClassification, FactorizedGPT2ForSequenceClassification),
    (AutoModelForTokenClassification, FactorizedGPT2ForTokenClassification),
    (AutoModelForQuestionAnswering, FactorizedGPT2ForQuestionAnswering),
):
    _auto.register(FactorizedGPT2Config, _model, exist_ok=True)
