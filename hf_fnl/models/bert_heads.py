"""Every head that Transformers has for BERT, on the factorized backbone, and their registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
)
from transformers.models.bert import modeling_bert as stock

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.models.attention import is_loaded
from hf_fnl.models.base import is_initialized
from hf_fnl.models.bert import (
    FactorizedBertConfig,
    FactorizedBertModel,
    FactorizedBertPreTrainedModel,
)
from hf_fnl.models.forwards import extends
from hf_fnl.models.packing import Packing, inside
from hf_fnl.models.tied_rows import tied_inputs
from hf_fnl.models.vocabulary import TiedVocabulary, causal_loss, tied_factors, vocabulary_layer


class _WithLMHead(TiedVocabulary, FactorizedBertPreTrainedModel):
    """A head with vocabulary logits: its decoder is tied to the word embedding, factor by factor."""

    def post_init(self) -> None:
        """Put our decoder in the place of the stock one, the first time, then initialize the model."""
        if not is_initialized(self):
            config, predictions = self.config, self.cls.predictions
            with init.no_init_weights():
                predictions.decoder = vocabulary_layer(
                    predictions.decoder, config.embedding_rank, config.ranks.method("embedding")
                )
            tied = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
            bias = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
            self._tied_weights_keys = tied_factors(tied, config.embedding_rank is not None) | bias
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        bias = self.cls.predictions.bias
        if module is self.cls.predictions.decoder and is_loaded(bias):
            init.copy_(module.bias, bias)  # untied, in a checkpoint of version 0.1: it has this bias only

    def _encode(self, inputs: dict[str, Any]) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, Tensor | None]:
        """Outputs of the backbone, and the matrix of the vocabulary if its gradient meets that of the embedding."""
        table = None
        if inputs.get("input_ids") is not None and inputs.get("inputs_embeds") is None:
            embedding, decoder = self.bert.embeddings.word_embeddings, self.cls.predictions.decoder
            input_ids, inputs_embeds, table = tied_inputs(embedding, decoder, inputs["input_ids"])
            inputs = {**inputs, "input_ids": input_ids, "inputs_embeds": inputs_embeds}
        return self.bert(**inputs), table

    def _predict(
        self, states: tuple[Tensor, ...], labels: Tensor | None, table: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """What the heads give, and the labels: at labelled positions only in training with ``sparse_prediction``."""
        if labels is not None and self.training and self.config.sparse_prediction:
            labelled = labels != IGNORE_INDEX
            states, labels = (states[0][labelled], *states[1:]), labels[labelled]
        if table is None:
            return self.cls(*states), labels
        return torch.func.functional_call(self.cls, {"predictions.decoder.weight": table}, states), labels

    def _masked_lm_loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        if self.config.sparse_prediction and labels.ndim > 1:  # otherwise already taken at labelled positions
            labelled = labels != IGNORE_INDEX
            logits, labels = logits[labelled], labels[labelled]
        return masked_lm_loss(logits, labels, num_items_in_batch)


def masked_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy summed over the labelled positions and divided by their number.

    Args:
        logits: ``(batch, length, vocab_size)``, or ``(labelled positions, vocab_size)``.
        labels: ``(batch, length)``, -100 where there is nothing to predict, or ``(labelled positions,)``.
        num_items_in_batch: Labelled positions in the whole batch, over accumulation steps and processes, of which these
            may be a part; their own number unless given.
    """
    logits, labels = logits.flatten(0, -2).float(), labels.flatten()
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_items_in_batch


def next_sentence_loss(
    logits: Tensor,
    labels: Tensor,
    num_sequences_in_batch: Tensor | int | None = None,
    share_of_batch: Tensor | float = 1.0,
) -> Tensor:
    """Cross-entropy of next-sentence prediction, averaged over the sequences of the whole batch.

    Args:
        logits: ``(batch, 2)``.
        labels: ``(batch,)``.
        num_sequences_in_batch: Sequences in the whole batch, over accumulation steps and processes.
        share_of_batch: Weight of these sequences in the whole batch, where their number is not known.
    """
    if num_sequences_in_batch is None:
        return F.cross_entropy(logits.float(), labels) * share_of_batch
    return F.cross_entropy(logits.float(), labels, reduction="sum") / num_sequences_in_batch


class FactorizedBertForPreTraining(_WithLMHead, stock.BertForPreTraining):
    """Masked language modelling and next-sentence prediction."""

    dense_class = stock.BertForPreTraining
    accepts_loss_kwargs = True

    def __init__(self, config: FactorizedBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.bert = FactorizedBertModel(config)
        self.cls = stock.BertPreTrainingHeads(config)
        self.post_init()

    @extends(stock.BertForPreTraining.forward, FactorizedBertModel.forward)
    def forward(
        self,
        *,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_sequences_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> stock.BertForPreTrainingOutput:
        """As the stock model, with a loss that adds up over parts of a batch.

        Args:
            labels: ``(batch, length)``, -100 where nothing is to be predicted.
            next_sentence_label: ``(batch,)``, 0 where B follows A and 1 where it is random.
            num_items_in_batch: Labelled positions in the whole batch, as the Trainer passes it.
            num_sequences_in_batch: Sequences in the whole batch. Without it each part's next-sentence loss weighs as
                much as its labelled positions.

        Returns:
            The stock output. ``prediction_logits`` are ``(labelled positions, vocab_size)`` in training with
            ``sparse_prediction``, else ``(batch, length, vocab_size)``.
        """
        outputs, table = self._encode(inputs)
        states = outputs.last_hidden_state, outputs.pooler_output
        (logits, relationship), kept = self._predict(states, labels, table)
        loss = None
        if kept is not None and next_sentence_label is not None:
            share = 1.0 if num_items_in_batch is None else (kept != IGNORE_INDEX).sum() / num_items_in_batch
            loss = self._masked_lm_loss(logits, kept, num_items_in_batch)
            loss = loss + next_sentence_loss(relationship, next_sentence_label, num_sequences_in_batch, share)
        return stock.BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=relationship,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FactorizedBertForMaskedLM(_WithLMHead, stock.BertForMaskedLM):
    """Masked language modelling."""

    dense_class = stock.BertForMaskedLM
    accepts_loss_kwargs = True

    def __init__(self, config: FactorizedBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.bert = FactorizedBertModel(config, add_pooling_layer=False)
        self.cls = stock.BertOnlyMLMHead(config)
        self.post_init()

    @extends(stock.BertForMaskedLM.forward, FactorizedBertModel.forward)
    def forward(
        self, *, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> MaskedLMOutput:
        """As the stock model, with a loss that adds up over parts of a batch.

        Args:
            labels: ``(batch, length)``, -100 where nothing is to be predicted.
            num_items_in_batch: Labelled positions in the whole batch, as the Trainer passes it.

        Returns:
            The stock output. ``logits`` are ``(labelled positions, vocab_size)`` in training with
            ``sparse_prediction``, else ``(batch, length, vocab_size)``.
        """
        outputs, table = self._encode(inputs)
        logits, kept = self._predict((outputs.last_hidden_state,), labels, table)
        return MaskedLMOutput(
            loss=None if kept is None else self._masked_lm_loss(logits, kept, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FactorizedBertLMHeadModel(_WithLMHead, stock.BertLMHeadModel):
    """Left-to-right language modelling, for a configuration with ``is_decoder=True``."""

    dense_class = stock.BertLMHeadModel
    accepts_loss_kwargs = True
    takes_packing = False

    def __init__(self, config: FactorizedBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.loss_type = "ForCausalLM"  # Transformers looks for it in the class's name and warns, which breaks a graph
        self.bert = FactorizedBertModel(config, add_pooling_layer=False)
        self.cls = stock.BertOnlyMLMHead(config)
        self.post_init()

    @extends(stock.BertLMHeadModel.forward, ForCausalLMLoss)
    def forward(
        self,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int | None = None,
        **inputs: Any,
    ) -> Any:
        """As the stock model, which has the arguments of its loss too, unnamed."""
        options = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
        return causal_loss(self, super().forward(**inputs), labels, shift_labels, **options)


class FactorizedBertForNextSentencePrediction(FactorizedBertPreTrainedModel, stock.BertForNextSentencePrediction):
    """Next-sentence prediction alone."""

    dense_class = stock.BertForNextSentencePrediction

    def __init__(self, config: FactorizedBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.bert = FactorizedBertModel(config)
        self.cls = stock.BertOnlyNSPHead(config)
        self.post_init()


def _classifier_dropout(config: FactorizedBertConfig) -> nn.Dropout:
    rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return nn.Dropout(rate)


class FactorizedBertForSequenceClassification(FactorizedBertPreTrainedModel, stock.BertForSequenceClassification):
    """Classification or regression of a sequence or a pair, as for GLUE."""

    dense_class = stock.BertForSequenceClassification

    def __init__(self, config: FactorizedBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = FactorizedBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class FactorizedBertForMultipleChoice(FactorizedBertPreTrainedModel, stock.BertForMultipleChoice):
    """Choice among several sequences, as for SWAG."""

    dense_class = stock.BertForMultipleChoice
    takes_packing = False

    def __init__(self, config: FactorizedBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.bert = FactorizedBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()


class FactorizedBertForTokenClassification(FactorizedBertPreTrainedModel, stock.BertForTokenClassification):
    """Classification of every token, as for named entities."""

    dense_class = stock.BertForTokenClassification

    def __init__(self, config: FactorizedBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = FactorizedBertModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy of one end of an answer, averaged over the sequences in which it lies, as the stock model has it.

    Args:
        logits: ``(sequences, length)``.
        positions: ``(sequences,)``.
    """
    length = logits.shape[1]
    return F.cross_entropy(logits, positions.clamp(0, length), ignore_index=length)


class FactorizedBertForQuestionAnswering(FactorizedBertPreTrainedModel, stock.BertForQuestionAnswering):
    """Extractive question answering, as for SQuAD."""

    dense_class = stock.BertForQuestionAnswering

    def __init__(self, config: FactorizedBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = FactorizedBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @extends(stock.BertForQuestionAnswering.forward, FactorizedBertModel.forward)
    def forward(
        self,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        packing: Packing | None = None,
        **inputs: Any,
    ) -> QuestionAnsweringModelOutput:
        """As the stock model; of a packed batch the logits are ``(sequences, longest)``, the lowest number behind ends.

        So the loss of a packed batch is that of its sequences one by one. The stock model's softmax takes in whatever
        comes out at the padding of a padded batch.
        """
        if packing is None:
            return super().forward(start_positions=start_positions, end_positions=end_positions, **inputs)
        outputs = super().forward(packing=packing, **inputs)
        outside = ~inside(packing)
        for name in ("start_logits", "end_logits"):
            outputs[name] = outputs[name].masked_fill(outside, torch.finfo(outputs[name].dtype).min)
        if start_positions is not None and end_positions is not None:
            outputs.loss = (
                span_loss(outputs.start_logits, start_positions) + span_loss(outputs.end_logits, end_positions)
            ) / 2
        return outputs


AutoConfig.register(FactorizedBertConfig.model_type, FactorizedBertConfig, exist_ok=True)
AutoTokenizer.register(FactorizedBertConfig, tokenizer_class=BertTokenizer, exist_ok=True)
for _auto, _model in (
    (AutoModel, FactorizedBertModel),
    (AutoModelForPreTraining, FactorizedBertForPreTraining),
    (AutoModelForMaskedLM, FactorizedBertForMaskedLM),
    (AutoModelForCausalLM, FactorizedBertLMHeadModel),
    (AutoModelForNextSentencePrediction, FactorizedBertForNextSentencePrediction),
    (AutoModelForSequenceClassification, FactorizedBertForSequenceClassification),
    (AutoModelForMultipleChoice, FactorizedBertForMultipleChoice),
    (AutoModelForTokenClassification, FactorizedBertForTokenClassification),
    (AutoModelForQuestionAnswering, FactorizedBertForQuestionAnswering),
):
    _auto.register(FactorizedBertConfig, _model, exist_ok=True)
