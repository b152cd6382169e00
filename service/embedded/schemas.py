"""Bodies of the OpenAI chat protocol, as far as a small vision-language model speaks it."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Body(BaseModel):
    """Strict about unknown keys: an option that would be ignored silently is an error."""

    model_config = ConfigDict(extra="forbid")


class ImageUrl(Body):
    url: str = Field(description="`data:image/png;base64,…`; no other kind of URL is accepted")
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


class EmbedsPart(Body):
    """An image as its projected visual tokens; vLLM's own, there behind `--enable-mm-embeds`."""

    type: Literal["image_embeds"]
    image_embeds: str = Field(description="base64 of `torch.save(tensor [N, hidden size])`")


class TextPart(Body):
    type: Literal["text"]
    text: str


Part = TextPart | ImagePart | EmbedsPart


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def parts(self) -> Sequence[Part]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(Body):
    include_usage: bool = False


class ChatCompletionRequest(Body):
    """POST /v1/chat/completions. What OpenAI does not know is vLLM's.

    `ignore_eos`: go on to `max_tokens`, for benchmarks. `prompt_logprobs`: tell how probable each token of
    the prompt was, and that many alternatives; with `continue_final_message` and without
    `add_generation_prompt` the prompt ends with the last message's text, so that a given answer is scored.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    ignore_eos: bool = False
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        if self.stream_options and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("`prompt_logprobs` is not available with `stream: true`")
        if self.continue_final_message == self.add_generation_prompt:
            raise ValueError("`continue_final_message` and `add_generation_prompt` must differ")
        if "" in self.stop_strings:
            raise ValueError("`stop` must not hold an empty string")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class LoadLoraRequest(Body):
    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str = Field(min_length=1)


class UnloadLoraRequest(Body):
    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None


def error_body(message: str, *, kind: str, status: int, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object with vLLM's habit of giving the status as `code`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
