"""The LightningModule of a vision-language model that learns to answer questions about pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import PackedImages, QuestionBatch
from .losses import AnsweringStep, language_loss
from .models.chat import Chat, following
from .models.encoder import Encoder, Prompts
from .models.loading import Weights
from .models.parameters import Row
from .tuning import LRSchedule, TunedModule


class VisualInstructionTuning(TunedModule):
    """A vision-language model, fine-tuned on questions about pictures and their answers: the language loss on the answers alone.

    Args:
        encoder: the model; its output head comes with it, as the part ``head``.
        parameters: the parameter table, of ``encoder.vision``, ``encoder.projector``, ``encoder.language`` and ``head``; a head that shares
            the weights of the language model's embedding has no row of its own.
        schedule: warm-up and decay of all learning rates.
        betas: of AdamW.
        max_new_tokens: of an answer.
        start: a checkpoint whose trained weights a fit begins from.

    Raises:
        ValueError: the encoder mixes its states, or the head is to train by LoRA.
    """

    def __init__(
        self,
        encoder: Encoder,
        parameters: tuple[Row, ...],
        schedule: LRSchedule = LRSchedule(),
        betas: tuple[float, float] = (0.9, 0.999),
        max_new_tokens: int = 64,
        start: str | None = None,
    ) -> None:
        super().__init__(parameters, schedule, betas, start)
        if encoder.mix is not None:
            raise ValueError("encoder.mix is of a generator's condition; a model that answers has none")
        if any(row.match == "head" and row.train == "lora" for row in parameters):
            raise ValueError("parameter row 'head': is frozen or full; LoRA has no place in a head")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
        self.encoder, self.max_new_tokens = encoder, max_new_tokens
        self.chat = Chat(encoder)

    def build(self, weights: Weights = True) -> None:
        self.head = self.encoder.build(weights)
        self.apply_table(["encoder", "head"])

    # -- one step ------------------------------------------------------------------------------------------------------------

    def prompts(self, texts: list[str], markers: list[list[int]], references: list[PackedImages]) -> Prompts:
        """Texts in the words of the chat template, as the language model reads them."""
        return self.encoder.embed(texts, markers, references, self.special)

    @property
    def special(self) -> bool:
        """Whether prompts hold special tokens, which a template has put there."""
        return self.chat.template is not None

    def forward(self, prompts: Prompts) -> Tensor:
        """Scores of the token after each, [b, n, vocabulary]."""
        return self.scores(self.encoder.read(prompts))

    def scores(self, states: Tensor) -> Tensor:
        """Hidden states [..., d] -> scores of the next token [..., vocabulary]."""
        return self.head(states.to(next(self.head.parameters()).dtype))  # type: ignore[no-any-return]

    def answering_step(self, batch: QuestionBatch) -> AnsweringStep:
        """Questions and their answers, read; and which tokens are the answers'."""
        given = list(zip(batch.instructions, batch.markers, strict=True))
        asked = [self.chat.asked(*of) for of in given]
        texts = [self.chat.answered(*of, answer) for of, answer in zip(given, batch.answers, strict=True)]
        with self.watched():
            prompts = self.prompts(texts, batch.markers, batch.references)
            logits = self(prompts)
        answered = following(self.encoder, prompts, asked, batch.markers, batch.references, self.special)
        return AnsweringStep(batch, prompts, prompts.tokens, answered, logits)

    def loss(self, step: AnsweringStep) -> dict[str, Tensor]:
        """The named terms of the loss, weighted."""
        return {"language": language_loss(step.logits, step.tokens, step.answered)} | self.added(step)

    def training_step(self, batch: QuestionBatch | None, batch_idx: int) -> Tensor | None:
        if batch is None:  # every row of it was bad; counted and listed by the data module
            return None
        return self.total(self.loss(self.answering_step(batch)), batch.size, batch.ids)

    def validation_step(self, batch: QuestionBatch, batch_idx: int) -> Tensor:
        total = torch.stack(list(self.loss(self.answering_step(batch)).values())).sum()
        self.log("loss/validation", total, batch_size=batch.size, sync_dist=True)
        return total

    def test_step(self, batch: QuestionBatch, batch_idx: int) -> Tensor:
        return self.validation_step(batch, batch_idx)

    # -- answers -------------------------------------------------------------------------------------------------------------

    def predict_step(self, batch: QuestionBatch, batch_idx: int) -> list[str]:
        """The answers."""
        return self.answer(batch)

    @torch.no_grad()
    def answer(self, batch: QuestionBatch) -> list[str]:
        """Greedy answers, each up to its end or ``max_new_tokens``."""
        asked = [self.chat.asked(text, marks) for text, marks in zip(batch.instructions, batch.markers, strict=True)]
        prompts = self.prompts(asked, batch.markers, batch.references)
        said: list[list[int]] = [[] for _ in asked]
        going = set(range(len(asked)))
        for _ in range(self.max_new_tokens):
            states = self.encoder.read(prompts)
            last = torch.stack([states[b, n - 1] for b, n in enumerate(prompts.lengths)])
            chosen = self.scores(last).argmax(-1)
            for b in tuple(going):
                said[b].append(int(chosen[b]))
                if any(end in self._text(said[b]) for end in self.chat.ends):
                    going.remove(b)
            if not going:
                break
            prompts = self._grown(prompts, chosen)
        return [self.chat.spoken(self._text(ids)) for ids in said]

    def language_score(self, texts: list[str]) -> tuple[float, int]:
        """The sum of -log p over the tokens of texts by themselves, and how many these are."""
        nothing: list[list[int]] = [[] for _ in texts]
        prompts = self.encoder.embed(texts, nothing, [])
        said = following(self.encoder, prompts, [""] * len(texts), nothing, [])
        count = int(said.sum())
        return float(language_loss(self(prompts), prompts.tokens, said)) * count, count

    def _text(self, ids: list[int]) -> str:
        return str(self.encoder.tokenizer.decode(ids, skip_special_tokens=False))

    def _grown(self, prompts: Prompts, chosen: Tensor) -> Prompts:
        """The prompts with a token [b] more each."""
        vectors = self.encoder.language.get_input_embeddings()(chosen)  # type: ignore[operator]
        grow = torch.nn.functional.pad
        inputs, tokens, mask = grow(prompts.inputs, (0, 0, 0, 1)), grow(prompts.tokens, (0, 1)), grow(prompts.mask, (0, 1))
        rows, ends = torch.arange(len(chosen), device=mask.device), torch.tensor(prompts.lengths, device=mask.device)
        inputs[rows, ends], tokens[rows, ends], mask[rows, ends] = vectors.to(inputs.dtype), chosen, True
        return prompts._replace(inputs=inputs, tokens=tokens, mask=mask, lengths=[n + 1 for n in prompts.lengths])
