"""Tokenizer and chat template of a converted model, and how the original code put a prompt into ids.

Templates: `conv_mistral_instruct` of microsoft/LLaVA-Med and `conv_vicuna_v1` of haotian-liu/LLaVA, both in
llava/conversation.py; the image stands first in the first question, as in their model_vqa.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from hscr.errors import DependencyMissing, InvalidCheckpoint, NotFound
from hscr.models.convert.stated import read_json

IMAGE = "<image>"
PAD = "<pad>"

Template = Literal["llava_med", "vicuna"]

# Parts are walked in place, not in a macro: vLLM looks for this loop to learn that content comes in parts.
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TEMPLATES: dict[Template, str] = {
    "llava_med": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' }}"
        "{% else %}{{ raise_exception('This model knows the roles user and assistant.') }}{% endif %}"
        f"{_CONTENT}"
        "{% if message['role'] == 'user' %}{{ ' [/INST]' }}{% else %}{{ ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "vicuna": (
        "{{ bos_token }}"
        f'{{% if messages[0]["role"] != "system" %}}{{{{ "{_VICUNA_SYSTEM}" }}}}{{% endif %}}'
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
        f"{_CONTENT}"
        "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}


def choose_template(model_type: str) -> Template:
    """What the family was trained with: LLaVA-Med 1.5 speaks Mistral's, LLaVA 1.5 Vicuna's."""
    return "llava_med" if model_type == "llava_mistral" else "vicuna"


def original_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The folder's own tokenizer: tokenizer.json as it is, else tokenizer.model.

    Raises NotFound, InvalidCheckpoint, DependencyMissing.
    """
    return _wrap(_backend(folder), _special(folder))


def converted_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The same with `<image>`, with `<pad>` where nothing or the end of the answer served for padding.

    The original tokenized the text on either side of an image as strings of their own, each with the space
    that SentencePiece puts before a string; so here that space stands after every special token.
    Raises NotFound, InvalidCheckpoint, DependencyMissing.
    """
    backend, special = _backend(folder), _special(folder)
    if getattr(backend.pre_tokenizer, "prepend_scheme", None) == "first":
        backend.pre_tokenizer.prepend_scheme = "always"
    backend.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    if special.get("pad_token") in {None, special["eos_token"]}:
        backend.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
        special["pad_token"] = PAD
    return _wrap(backend, special, padding_side="left", extra_special_tokens={"image_token": IMAGE})


def original_prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, image_token_id: int) -> list[int]:
    """Ids as `tokenizer_image_token` of llava/mm_utils.py makes them: text between images on its own.

    prompt: without beginning-of-sequence; the tokenizer adds it to the first piece.
    """
    first, *rest = prompt.split(IMAGE)
    ids = tokenizer(first)["input_ids"]
    for piece in rest:
        ids = [*ids, image_token_id, *tokenizer(piece, add_special_tokens=False)["input_ids"]]
    return ids


def _wrap(backend: Tokenizer, special: dict[str, str], **more: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **more)


def _special(folder: Path) -> dict[str, str]:
    """The role names (bos_token …) of special tokens, from the two files that may state them."""
    stated = read_json(folder / "tokenizer_config.json") | read_json(folder / "special_tokens_map.json")
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    found = {role: stated[role] for role in roles if stated.get(role)}
    special = {role: _content(folder, token) for role, token in found.items()}
    return {"bos_token": "<s>", "eos_token": "</s>"} | special


def _content(folder: Path, token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise InvalidCheckpoint(
            f"{folder} names {token!r} as a special token.",
            remedy="Download tokenizer_config.json and special_tokens_map.json again.",
        )
    return content


def _backend(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _saved(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        backend = _sentencepiece(folder / "tokenizer.model")
        _add(backend, _added(folder))
        return backend
    raise NotFound(
        f"{folder} holds no tokenizer.",
        remedy="Download tokenizer.model or tokenizer.json beside the weights.",
    )


def _saved(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no narrower one
        raise InvalidCheckpoint(
            f"{file} cannot be read as a tokenizer: {error}.", remedy="Download it again."
        ) from error


def _sentencepiece(file: Path) -> Tokenizer:
    """A SentencePiece BPE model with byte fallback, as Llama's and Mistral's are.

    Merges are ordered by the score of what they make, which is SentencePiece's own rule.
    """
    model = _read_sentencepiece(file)
    rules = model.normalizer_spec
    if model.trainer_spec.model_type != 2 or rules.precompiled_charsmap or not rules.add_dummy_prefix:
        raise InvalidCheckpoint(
            f"{file} is no SentencePiece BPE model without text normalisation.",
            remedy="Give a tokenizer.json beside it.",
        )
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == 1}
    merges = generate_merges(vocabulary, vocab_scores=normal)
    unknown, begin = (model.pieces[n].piece for n in (model.trainer_spec.unk_id, model.trainer_spec.bos_id))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, vocabulary[begin])],
    )
    _add(backend, ((piece.piece, vocabulary[piece.piece]) for piece in model.pieces if piece.type in {2, 3}))
    return backend


def _read_sentencepiece(file: Path) -> Any:
    try:
        model = import_protobuf().ModelProto()
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # noqa: PLC0415
    except ImportError as error:
        raise DependencyMissing(
            "tokenizer.model cannot be read without protobuf.", remedy="pip install protobuf"
        ) from error
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise InvalidCheckpoint(
            f"{file} cannot be read as a SentencePiece model.", remedy="Download it again."
        ) from error
    return model


def _added(folder: Path) -> dict[str, int]:
    """Tokens that training code put behind the SentencePiece vocabulary."""
    file = folder / "added_tokens.json"
    added = read_json(file)
    if not all(isinstance(number, int) for number in added.values()):
        raise InvalidCheckpoint(f"{file} gives ids that are no numbers.", remedy="Download it again.")
    return added


def _add(backend: Tokenizer, tokens: dict[str, int] | Iterable[tuple[str, int]]) -> None:
    for token, number in sorted(dict(tokens).items(), key=lambda item: item[1]):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if backend.token_to_id(token) != number:
            raise InvalidCheckpoint(
                f"The tokenizer gives {token} the id {backend.token_to_id(token)}, its files say {number}.",
                remedy="Download the tokenizer's files again.",
            )
