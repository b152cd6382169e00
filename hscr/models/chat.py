"""Conversations as token ids: the chat template around user text that can never act as control."""

from collections.abc import Sequence
from typing import Any

from hscr.errors import InvalidCheckpoint, InvalidQuestion, InvalidRecord

Message = dict[str, Any]


def context_length(config: Any) -> int:
    """Tokens that a LLaVA of this configuration reads at most, visual ones included."""
    text = config.text_config
    window = getattr(text, "sliding_window", None) or text.max_position_embeddings
    # Every token sees all before it, so a conversation ends where a sliding window would begin to slide.
    return int(min(text.max_position_embeddings, window))


class Chat:
    """The text side of a model: processor, tokenizer and chat template."""

    def __init__(self, processor: Any, image_token_id: int, image_token_count: int, context: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = image_token_id
        self.eos_id: int = self.tokenizer.eos_token_id
        self.special_ids = frozenset(self.tokenizer.all_special_ids)
        self._image_length = image_token_count
        self._limit = context
        # What stands before an answer: a tokenizer may read the same text otherwise at a string's start.
        prompt = self._checked_prompt()
        self._anchor = prompt[len(prompt.rstrip().rpartition(" ")[0]) :]
        self._lead = self._answer_lead(prompt)

    def _checked_prompt(self) -> str:
        """Raises InvalidCheckpoint for a chat template that cannot put a question about an image."""
        from jinja2 import TemplateError  # noqa: PLC0415  comes with transformers

        try:
            prompt = self.prompt("x")
        except (ValueError, TemplateError) as error:
            raise _unusable(str(error)) from error
        images = self._encode(prompt).count(self.image_token_id)
        if images != 1:
            raise _unusable(f"it shows {images} images to a question about one")
        return prompt

    def prompt(self, question: str) -> str:
        """The chat template's text for one user turn with an image. Raises InvalidQuestion."""
        return self._render(self._turn(question))

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of `prompt`, the image as one placeholder. Raises InvalidQuestion."""
        return self.chat_ids(self._turn(question))

    def chat_ids(self, messages: Sequence[Message], *, continued: bool = False) -> list[int]:
        """Token ids of a conversation up to the assistant's turn, each image as one placeholder.

        messages: `{"role", "content": [{"type": "image"} | {"type": "text", "text": str}, ...]}`.
        continued: up to the end of the last message's text instead, as if its author were not done.
        Raises InvalidQuestion when a text holds special tokens or everything exceeds the context.
        """
        ids = self._encode(self._render(messages, continued=continued))
        # Compared with a harmless text, so that no user text, even split over parts, acts as control.
        harmless = [_with_text(message, "x") for message in messages]
        plain = self._encode(self._render(harmless, continued=continued))
        if self._specials(ids) != self._specials(plain):
            raise InvalidQuestion(
                "The question contains control tokens of the model.",
                remedy="Remove markup such as <image> or </s> from the text.",
            )
        length = len(ids) + ids.count(self.image_token_id) * (self._image_length - 1)
        if length >= self._limit:
            raise InvalidQuestion(
                f"The prompt has {length} tokens; the model reads fewer than {self._limit}.",
                remedy="Ask a shorter question.",
            )
        return ids

    def expanded(self, ids: Sequence[int]) -> list[int]:
        """The same with as many placeholders for an image as it has visual tokens, as engines count them."""
        return [
            token
            for each in ids
            for token in [each] * (self._image_length if each == self.image_token_id else 1)
        ]

    def completion_ids(self, answer: str) -> list[int]:
        """Token ids of `answer` as the assistant's turn, closed by end-of-sequence.

        Raises InvalidRecord when the answer is empty or holds special tokens.
        """
        return self.completions_ids([answer])[0]

    def completions_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """`completion_ids` of each answer, tokenised in one call."""
        texts = [self._anchor + self._lead + answer.strip() for answer in answers]
        encoded = self.tokenizer([self._anchor, *texts], add_special_tokens=False)["input_ids"]
        head, *wholes = encoded
        tails = [ids[len(head) :] for ids in wholes]
        for answer, ids, tail in zip(answers, wholes, tails, strict=True):
            if not answer.strip() or not tail or ids[: len(head)] != head or self._specials(tail):
                raise InvalidRecord(
                    "The answer is empty, holds control tokens, or does not continue the prompt.",
                    remedy="Give a plain, non-empty text.",
                )
        return [[*tail, self.eos_id] for tail in tails]

    def text(self, ids: Sequence[int]) -> str:
        """Plain text of completion ids."""
        decoded: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded.strip()

    def _turn(self, question: str) -> list[Message]:
        if not question.strip():
            raise InvalidQuestion("The question is empty.", remedy="Write what you want to know.")
        return [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.strip()}]},
        ]

    def _answer_lead(self, prompt: str) -> str:
        answered = [*self._turn("x"), {"role": "assistant", "content": [{"type": "text", "text": "y"}]}]
        return self._render(answered, generate=False).removeprefix(prompt).partition("y")[0]

    def _render(self, messages: Sequence[Message], *, generate: bool = True, continued: bool = False) -> str:
        return self.processor.apply_chat_template(
            list(messages),
            add_generation_prompt=generate and not continued,
            continue_final_message=continued,
        )

    def _encode(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token
        add = bos is None or not text.startswith(bos)
        return self.tokenizer(text, add_special_tokens=add)["input_ids"]

    def _specials(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self.special_ids]


def _with_text(message: Message, text: str) -> Message:
    parts = [{**part, "text": text} if part["type"] == "text" else part for part in message["content"]]
    return {**message, "content": parts}


def _unusable(why: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"The model's chat template cannot be used: {why.rstrip('.')}.",
        remedy="Take chat_template.jinja from where the model came from, or convert it again.",
    )
