"""Proof that a converted folder is the model it was made from, and that it sees."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hscr.errors import InvalidCheckpoint, InvalidQuestion
from hscr.models.convert.original import VISION, Original
from hscr.models.convert.shards import Advance, Target, hub_name
from hscr.models.convert.text import original_prompt_ids, original_tokenizer
from hscr.models.phantom.anatomy import Phantom, render
from hscr.models.vlm import VLM

CANARY_THRESHOLD = 0.01
"""Nats per token. A model that does not see changes by 0, in bfloat16 too: its two prompts are equal."""
LOGITS_TOLERANCE = 1e-5
"""Relative to the largest logit: the same weights in the same operations."""

_QUESTION = "What does this image show?"
_ANSWER = "The image shows a chest radiograph."
_QUESTIONS = (_QUESTION, "Is there a nodule in the left lung?", "Où est la lésion (≥ 3 cm)?\nAnswer briefly.")


class Canary(NamedTuple):
    """What becomes of one answer when noise takes the place of a drawn chest radiograph."""

    change: float
    """mean absolute difference of its tokens' log-probs, nats per token"""
    answer: str
    """the model's own greedy answer to the radiograph, for a person to read"""


def same_weights(vlm: VLM, plan: list[Target], advance: Advance) -> dict[str, str]:
    """Compare every tensor of the loaded model with its source, bit for bit after the change of dtype.

    Returns SHA-256 digests of the first and the last vision layer. Raises InvalidCheckpoint.
    """
    loaded = {hub_name(name): tensor for name, tensor in vlm.model.state_dict().items()}
    total, done = sum(target.size for target in plan), 0
    for target in plan:
        if not torch.equal(loaded[target.name].cpu(), target.make()):
            raise InvalidCheckpoint(
                f"{target.name} was loaded with other values than {target.source.name} has.",
                remedy="Delete the unfinished folder and convert again.",
            )
        done += target.size
        advance(done, total)
    _refuse_untrained({name: loaded[name] for name in loaded if name.startswith(VISION)})
    last = vlm.model.config.vision_config.num_hidden_layers - 1
    return {
        f"vision layer {layer}": _digest(loaded, f"{VISION}encoder.layers.{layer}.") for layer in (0, last)
    }


@torch.no_grad()
def same_language(vlm: VLM, original: Original) -> float:
    """Largest difference of text-only logits from the plain language model of the original configuration.

    The plain model shares the loaded weights, which `same_weights` compared; so this compares what the two
    configurations make of them (rotary base, window, norms, heads). Raises InvalidCheckpoint.
    """
    ids = torch.tensor([vlm.completion_ids(_ANSWER)], device=vlm.device)
    found = vlm.model(input_ids=ids).logits.float()
    expected = _plain(vlm, original)(input_ids=ids).logits.float()
    difference = (found - expected).abs().max().item()
    if not difference <= LOGITS_TOLERANCE * expected.abs().max().item():
        raise InvalidCheckpoint(
            f"The converted language model's logits differ by {difference:.3g} from the original's.",
            remedy="Report this with the checkpoint's config.json: a field of it was read otherwise.",
        )
    return difference


def same_prompts(vlm: VLM, original: Original) -> int:
    """Compare prompt ids with those of the original code, for several questions; returns how many.

    Raises InvalidCheckpoint.
    """
    tokenizer = original_tokenizer(original.folder)
    for question in _QUESTIONS:
        text = vlm.prompt(question).removeprefix(tokenizer.bos_token)
        if _ids(vlm, question) != original_prompt_ids(tokenizer, text, vlm.image_token_id):
            raise InvalidCheckpoint(
                f"The prompt of {question!r} becomes other ids than the original code makes of it.",
                remedy="Give the tokenizer's original files (tokenizer.model, or tokenizer.json).",
            )
    return len(_QUESTIONS)


def _ids(vlm: VLM, question: str) -> list[int]:
    try:
        return vlm.prompt_ids(question)
    except InvalidQuestion as error:
        raise InvalidCheckpoint(
            f"The model is too short for one image and a question. {error.detail}",
            remedy="Correct max_position_embeddings or sliding_window in the checkpoint's config.json.",
        ) from error


@torch.no_grad()
def look(vlm: VLM) -> Canary:
    """Measure the canary. Raises InvalidCheckpoint below CANARY_THRESHOLD."""
    radiograph = render(Phantom(seed=0, study="chest radiograph")).convert("RGB")
    noise = np.random.default_rng(0).integers(0, 256, (*radiograph.size[::-1], 3), dtype=np.uint8)
    seen, unseen = (_answer_logprobs(vlm, image) for image in (radiograph, Image.fromarray(noise)))
    change = (seen - unseen).abs().mean().item()
    if not change >= CANARY_THRESHOLD:
        raise InvalidCheckpoint(
            f"Noise in place of a radiograph changes an answer by {change:.2g} nats per token; a model that "
            f"sees changes by {CANARY_THRESHOLD} at least.",
            remedy="The checkpoint's projector or vision tower is not the one it was trained with.",
        )
    return Canary(change, _greedy(vlm, radiograph))


def _answer_logprobs(vlm: VLM, image: Image.Image) -> Tensor:
    answer = torch.tensor(vlm.completion_ids(_ANSWER), device=vlm.device)
    prompt = _prompt(vlm)
    logits = vlm.model(
        input_ids=torch.cat([prompt, answer[None]], dim=1), pixel_values=vlm.pixel_values([image])
    ).logits
    before = logits[0, -len(answer) - 1 : -1].float()
    return before.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def _greedy(vlm: VLM, image: Image.Image) -> str:
    prompt = _prompt(vlm)
    ids = vlm.model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        pixel_values=vlm.pixel_values([image]),
        do_sample=False,
        max_new_tokens=32,
        pad_token_id=vlm.tokenizer.pad_token_id,
    )
    return vlm.text(ids[0, prompt.shape[1] :].tolist())


def _prompt(vlm: VLM) -> Tensor:
    """[1, L]: ids with the image's placeholder as often as the image has tokens."""
    ids = [vlm.prompt_ids(_QUESTION)]
    counts = [vlm.image_token_count if token == vlm.image_token_id else 1 for token in ids[0]]
    repeated = [token for token, count in zip(ids[0], counts, strict=True) for _ in range(count)]
    return torch.tensor([repeated], device=vlm.device)


def _plain(vlm: VLM, original: Original) -> Any:
    config = original.language
    config.vocab_size = vlm.model.lm_head.out_features
    # The original's id may lie beyond its vocabulary, and no logit depends on it.
    config.pad_token_id = None
    config._attn_implementation = "sdpa"
    kind = MistralForCausalLM if isinstance(config, MistralConfig) else LlamaForCausalLM
    with torch.device("meta"):
        plain = kind(config)
    shared = {f"model.{name}": tensor for name, tensor in vlm.model.model.language_model.state_dict().items()}
    plain.load_state_dict(shared | {"lm_head.weight": vlm.model.lm_head.weight}, assign=True)
    # Rotary frequencies are computed, not loaded, and on the meta device they have no values.
    plain.model.rotary_emb = type(plain.model.rotary_emb)(config).to(vlm.device)
    return plain.eval()


def _refuse_untrained(tower: dict[str, Tensor]) -> None:
    """A CLIP tower fresh from its constructor has biases of 0 and norms of 1; training moves every one."""
    biases = all(not tensor.any() for name, tensor in tower.items() if name.endswith(".bias"))
    norms = all(
        (tensor == 1).all()
        for name, tensor in tower.items()
        if name.endswith(".weight") and "norm" in name.rsplit(".", 2)[-2]
    )
    if biases and norms:
        raise InvalidCheckpoint(
            "The vision tower was never trained: all its biases are 0 and all its norms 1.",
            remedy="Name the folder of the trained CLIP model with --vision-tower --replace-vision-tower.",
        )


def _digest(tensors: dict[str, Tensor], prefix: str) -> str:
    total = hashlib.sha256()
    for content in _contents(tensors, prefix):
        total.update(content)
    return total.hexdigest()


def _contents(tensors: dict[str, Tensor], prefix: str) -> Iterator[bytes]:
    for name in sorted(name for name in tensors if name.startswith(prefix)):
        yield tensors[name].cpu().contiguous().view(torch.uint8).numpy().tobytes()
