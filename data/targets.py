"""What a language model is trained and judged on, behind one face: text, letters, answers.

    Windows    a text: guess the next token (bytes, or the tokens of a checkpoint)
    Letters    multiple choice for a causal model: which letter comes after the question?
    Prompts    a task of data/tasks.py as text to text, for an encoder-decoder

All have `calibration` and `validation`, lists of batches, and
    train_batch(step)                   a batch, a function of the step alone
    outputs(model, batch)               logits [batch, time, classes], labels [batch, time]; -100:
                                        no label
    token_mask(batch, layer)            [batch, time] bool of the tokens that a layer, by name,
                                        meets: False is padding; None: there is none
    answers(model, batch, logits)       one for each sequence
    scores(answers)                     {metric: percent}; the first is the one that papers quote
`config` has context, batch_size, calibration and eval_sequences (0: all), the last two of them also
task; `stream` numbers the random stream of training batches.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import pretrained, text


class Windows:
    """A batch is windows [batch, context + 1] of a text. train, val [tokens]."""

    def __init__(self, train: Tensor, val: Tensor, config: Any, device: str, stream: int):
        self.train = train
        self.config = config
        self.device = device
        self.stream = stream
        self.calibration = self.sample(config.calibration, -1).split(32)
        windows = text.all_windows(val, config.context)
        self.validation = windows[: config.eval_sequences or None].to(device).split(64)

    def sample(self, count: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.stream + step)
        length = self.config.context + 1
        return text.sample_windows(self.train, count, length, generator).to(self.device)

    def train_batch(self, step: int) -> Tensor:
        return self.sample(self.config.batch_size, step)

    def outputs(self, model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
        found = model(windows[:, :-1])
        logits = found if isinstance(found, Tensor) else found.logits
        return logits, windows[:, 1:]

    def token_mask(self, windows: Tensor, layer: str) -> None:
        return None

    def answers(self, model: nn.Module, windows: Tensor, logits: Tensor) -> list[float]:
        """The share of tokens that are right."""
        return (logits.argmax(dim=-1) == windows[:, 1:]).double().mean(dim=1).tolist()

    def scores(self, answers: list[float]) -> dict[str, float]:
        return {"accuracy": 100 * sum(answers) / len(answers)}


class Letters:
    """A batch is (tokens [batch, time], padded on the right, lengths [batch], labels [batch])."""

    def __init__(self, folder: Path, config: Any, data_dir: Path, device: str, stream: int):
        self.config = config
        self.device = device
        self.stream = stream
        everything = 1 << 40
        questions = pretrained.letter_questions(
            folder, config.task, data_dir, everything, config.context, stream
        )
        self.train, self.dev, self.letters, _ = questions
        self.calibration = self.batches(self.train, config.calibration)
        self.validation = self.batches(self.dev, config.eval_sequences)

    def batches(self, questions: pretrained.Questions, count: int) -> list[tuple]:
        rows = torch.arange(len(questions.labels))[: count or None]
        return [questions.batch(part, self.device) for part in rows.split(8)]

    def train_batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.train.train_batch(step, self.config.batch_size, self.stream, self.device)

    def outputs(self, model: nn.Module, batch: tuple) -> tuple[Tensor, Tensor]:
        tokens, lengths, labels = batch
        logits = pretrained.last_logits(model, tokens, lengths)  # [batch, vocab_size]
        return logits[:, None, self.letters], labels[:, None]

    def token_mask(self, batch: tuple, layer: str) -> Tensor:
        tokens, lengths, _ = batch
        return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]

    def answers(self, model: nn.Module, batch: tuple, logits: Tensor) -> list[bool]:
        return (logits[:, 0].argmax(dim=-1) == batch[2]).tolist()

    def scores(self, answers: list[bool]) -> dict[str, float]:
        return {"accuracy": 100 * sum(answers) / len(answers)}


class Prompts(pretrained.TextToText):
    """Batches as those of pretrained.TextToText."""

    def __init__(self, folder: Path, config: Any, data_dir: Path, device: str, stream: int):
        super().__init__(config.task, data_dir, folder, config.context, device)
        self.batch_size, self.stream = config.batch_size, stream
        self.calibration = self.sample(config.calibration, 32, stream)
        self.validation = self.dev_batches(config.eval_sequences, 64)

    def train_batch(self, step: int) -> dict[str, Tensor]:
        return super().train_batch(step, self.batch_size, self.stream)

    def scores(self, answers: list) -> dict[str, float]:
        shares = super().scores(answers, slice(len(answers)))
        return {name: 100 * share for name, share in shares.items()}
