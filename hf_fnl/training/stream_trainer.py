"""A Trainer that lets every process read its own part of a stream."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from hf_fnl.training.checkpoints.trainer import CheckpointingTrainer
from hf_fnl.training.stream_evaluation import EvaluationLoader
from hf_fnl.training.stream_loader import StreamLoader, StreamProgress, reading_options
from hf_fnl.training.streaming import ShardedStream


class StreamingTrainer(CheckpointingTrainer):
    """A :class:`CheckpointingTrainer` for data sets that are a :class:`~hf_fnl.training.streaming.ShardedStream`, too.

    Checkpoints say how far a stream has been trained on; other data sets are read as in Transformers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(StreamProgress())

    def get_train_dataloader(self) -> DataLoader | StreamLoader:
        """As in Transformers; a stream is read by every process for itself, and goes on where a checkpoint says."""
        if not isinstance(self.train_dataset, ShardedStream):
            return super().get_train_dataloader()
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        options = reading_options(self.args)
        return StreamLoader(self.train_dataset, collate, batch_size=self._train_batch_size, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader | EvaluationLoader:
        """As in Transformers; of a stream every process reads its own part."""
        if isinstance(eval_dataset, str):
            stream = self.eval_dataset[eval_dataset]
        else:
            stream = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(stream, ShardedStream):
            return super().get_eval_dataloader(eval_dataset)
        collate = self._get_collator_with_removed_columns(self.data_collator, description="evaluation")
        options = reading_options(self.args)
        return EvaluationLoader(stream, collate, batch_size=self.args.eval_batch_size, **options)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As in Transformers, with no batch to skip of a stream, which begins behind them."""
        epochs, steps = super()._init_training_state(*args, **kwargs)
        return epochs, 0 if isinstance(self.train_dataset, ShardedStream) else steps

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in :class:`CheckpointingTrainer`; also how far a stream has been taken."""
        StreamProgress.record(self.state, self.callback_handler.train_dataloader)
        super()._save_checkpoint(model, trial)
