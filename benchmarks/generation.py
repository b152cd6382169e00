"""`make bench-generation`: contrastive decoding against VCD's loop and the strongest batch of transformers.

All three decode the same records by the same rule: at each step the token most probable under P_diff of the
full and the dropped stream. VCD's loop (arXiv 2311.16922), ported to transformers 5, holds one record and two
caches that grow apart; the batch puts both streams of many records into one `generate` call and combines
their rows in a logits processor, with the cache and batch size that are fastest here. Both may encode each
image once. Weights are random and end-of-sequence is off, so that every answer has 64 tokens.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import logging

from benchmarks.drawing import draw
from benchmarks.limits import Rates, Work, decoding_floor
from hscr.config import GenerateConfig
from hscr.contrast.contrast import first_best
from hscr.contrast.decode import Request, Rule, decode
from hscr.contrast.degrade import kept_tokens
from hscr.contrast.generate import generate
from hscr.models.attention import NAME as ROWS
from hscr.models.language import View
from hscr.models.phantom.architecture import build_processor, build_tokenizer
from hscr.models.vlm import VLM
from hscr.records import PreferenceSource

TOKENS, BETA, RATE = 64, 0.9, 0.7
QUESTIONS = ["Is there a nodule in the left lung?", "Which organ does this image show, and from which side?"]

Answers = list[list[int]]


class Record(NamedTuple):
    prompt: list[int]
    pixels: Tensor
    """[1, 3, H, W]"""
    kept: Tensor
    """indices of the visual tokens that the dropped stream keeps"""


def shapes(device: str) -> LlavaConfig:
    """On a CPU a small model in LLaVA-Med's proportions (CLIP, Mistral), on a GPU LLaVA-1.5-7B's shapes."""
    large = device == "cuda"
    text = LlamaConfig(
        hidden_size=4096 if large else 256,
        intermediate_size=11008 if large else 896,
        num_hidden_layers=32 if large else 4,
        num_attention_heads=32 if large else 4,
        num_key_value_heads=32 if large else 1,
        vocab_size=32064 if large else 32000,
        max_position_embeddings=4096,
        initializer_range=0.02 if large else 0.1,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024 if large else 128,
        intermediate_size=4096 if large else 512,
        num_hidden_layers=24 if large else 4,
        num_attention_heads=16 if large else 2,
        image_size=336,
        patch_size=14,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=2,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def load(device: str) -> VLM:
    """A model with random weights behind the phantom's tokenizer."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlavaForConditionalGeneration(shapes(device))
    torch.set_default_dtype(torch.float32)
    model.eval().requires_grad_(False)
    processor = build_processor(build_tokenizer(QUESTIONS * 4))
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    return VLM(model, processor, digest="random weights", template_digest="phantom")


def records(vlm: VLM, count: int) -> list[Record]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        pixels = torch.randn(1, 3, 336, 336, generator=generator).to(vlm.device, vlm.model.dtype)
        made.append(
            Record(vlm.prompt_ids(QUESTIONS[number % 2]), pixels, kept_tokens(576, RATE, number, "benchmark"))
        )
    return made


def ours(vlm: VLM, work: Sequence[Record]) -> Answers:
    vlm.model.set_attn_implementation({"text_config": ROWS})

    def requests() -> Any:
        for start in range(0, len(work), 8):
            batch = work[start : start + 8]
            visual = vlm.visual_tokens(torch.cat([record.pixels for record in batch]))
            for number, (record, tokens) in enumerate(zip(batch, visual, strict=True), start):
                dropped = View.whole(tokens[record.kept.to(tokens.device)])
                yield Request(str(number), record.prompt, View.whole(tokens), dropped)

    found = decode(
        vlm, requests(), Rule(beta=BETA), stop_id=None, slots=64, max_tokens=TOKENS,
        compiled=vlm.device.type == "cuda",
    )  # fmt: skip
    answers = {int(done.key): done.ids for done in found}
    return [answers[number] for number in range(len(work))]


def vcd(vlm: VLM, work: Sequence[Record]) -> Answers:
    """One record at a time, two forward passes a token, two caches."""
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    answers = []
    for record in work:
        caches = [DynamicCache(), DynamicCache()]
        inputs = [{"inputs_embeds": row[None]} for row in _streams(vlm, record)]
        ids: list[int] = []
        while len(ids) < TOKENS:
            logits = [
                vlm.model(**row, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                for row, cache in zip(inputs, caches, strict=True)
            ]
            token = _greedy(*logits)
            ids.append(int(token))
            inputs = [{"input_ids": token[:, None]}] * 2
        answers.append(ids)
    return answers


class _Contrast(LogitsProcessor):
    """Rows 0..N-1 are full, N..2N-1 dropped; both halves get the same contrasted scores."""

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        full, dropped = scores.chunk(2)
        chosen = _greedy(full, dropped)
        forced = torch.full_like(full, -torch.inf).scatter_(1, chosen[:, None], 0.0)
        return forced.repeat(2, 1)


def hf_batch(vlm: VLM, work: Sequence[Record], *, size: int, cache: str | None) -> Answers:
    """`generate` over both streams of `size` records at a time, padded on the left to one length."""
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    answers: Answers = []
    for start in range(0, len(work), size):
        pairs = [_streams(vlm, record) for record in work[start : start + size]]
        rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        length = max(map(len, rows))
        embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=vlm.device)
        said = vlm.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.arange(length, device=vlm.device) >= length - lengths[:, None],
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([_Contrast()]),
            disable_compile=True,  # each shape anew takes longer than this whole benchmark
            **({} if cache is None else {"cache_implementation": cache}),
        )
        answers += said[: len(pairs)].tolist()
    return answers


def _streams(vlm: VLM, record: Record) -> tuple[Tensor, Tensor]:
    """Embedded prompts [L, d] with all visual tokens and with the kept ones."""
    (tokens,) = vlm.visual_tokens(record.pixels)
    views = [View.whole(tokens), View.whole(tokens[record.kept.to(tokens.device)])]
    full, dropped = vlm.embed([record.prompt] * 2, views).embeds
    return full, dropped


def _greedy(full: Tensor, dropped: Tensor) -> Tensor:
    """[R] of logits [R, V]: the rule of `hscr.contrast.decode.Rule`."""
    return first_best((1 + BETA) * full.float() - BETA * dropped.float())


def teacher_forced(vlm: VLM, count: int) -> float:
    """Records per second of `hscr.contrast.generate` in its default mode, answers of about 64 tokens."""
    vlm.model.set_attn_implementation({"text_config": ROWS})
    answer = vlm.text(vlm.completion_ids("left lung nodule side image organ " * 12)[: TOKENS - 1])
    generator = torch.Generator().manual_seed(2)
    sources = []
    for number in range(count):
        noise = torch.randint(0, 255, (336, 336, 3), generator=generator, dtype=torch.uint8)
        source = PreferenceSource(
            id=f"s{number}", image_digest=f"i{number}", study="s", question=QUESTIONS[number % 2],
            chosen=answer, consent=True,
        )  # fmt: skip
        sources.append((source, Image.fromarray(noise.numpy())))
    started = time.perf_counter()
    made = list(generate(vlm, sources, GenerateConfig(), batch_size=8))
    return len(made) / (time.perf_counter() - started)


def timed(call: Callable[[], Answers], device: str) -> tuple[float, Answers]:
    started = time.perf_counter()
    answers = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, answers


def floor(vlm: VLM, work: Sequence[Record], device: str) -> float:
    """Seconds that the products and the memory of the work must take at this machine's measured rates."""
    shown, kept = 576, len(work[0].kept)
    text = max(len(record.prompt) for record in work) - 1
    machine = Rates.measure(device, vlm.model.dtype)
    shape = Work(vlm.model.config, vlm.model.dtype.itemsize)
    return decoding_floor(
        shape, machine, records=len(work), full=shown + text, dropped=kept + text, tokens=TOKENS
    )


def strongest(vlm: VLM, work: Sequence[Record], device: str) -> dict[str, Any]:
    """The batch size and cache with which transformers is fastest on this machine."""
    choices = [{"size": size, "cache": cache} for size in (8, 16, 32) for cache in (None, "static")]
    seconds = [timed(lambda c=choice: hf_batch(vlm, work, **c), device)[0] for choice in choices]
    for choice, value in zip(choices, seconds, strict=True):
        print(f"  transformers, batch {choice['size']}, {choice['cache'] or 'dynamic'} cache: {value:.2f} s")
    return choices[seconds.index(min(seconds))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vcd-records", type=int, help="time VCD's loop once, on so many, and scale it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="PNG to draw the three sizes into")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    vlm = load(device)
    work = records(vlm, options.records)
    with torch.inference_mode():
        print(json.dumps(measure(vlm, work, options, device)))


def measure(vlm: VLM, work: Sequence[Record], options: argparse.Namespace, device: str) -> dict[str, Any]:
    count, quarter = len(work), len(work) // 4
    timed(lambda: ours(vlm, work[:8]), device)
    timed(lambda: ours(vlm, work), device)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    best = strongest(vlm, work[: max(8, quarter * 2)], device)
    contestants: dict[str, Callable[[Sequence[Record]], Answers]] = {
        "ours": lambda some: ours(vlm, some),
        "hf_batch": lambda some: hf_batch(vlm, some, **best),
        "vcd": lambda some: vcd(vlm, some),
    }
    if options.vcd_records:
        del contestants["vcd"]
    sizes = [quarter, quarter * 2, count]
    seconds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in contestants}
    said: dict[str, Answers] = {}
    for repeat in range(options.repeats):
        for size in sizes if repeat == 0 else [count]:
            for name, run in contestants.items():
                took, said[name] = timed(lambda r=run, n=size: r(work[:n]), device)
                seconds[name][size].append(took)
                print(f"  {name}, {size} records: {took:.2f} s", flush=True)
    if options.vcd_records:
        some = work[: options.vcd_records]
        took, said["vcd"] = timed(lambda: vcd(vlm, some), device)
        print(f"  vcd, {len(some)} records: {took:.2f} s", flush=True)
        seconds["vcd"] = {size: [took * size / len(some)] for size in sizes}
    median = {name: {n: statistics.median(v) for n, v in by.items()} for name, by in seconds.items()}
    answers = zip(said["ours"], said["vcd"], strict=not options.vcd_records)
    equal = [a == b for one, other in answers for a, b in zip(one, other, strict=True)]
    least = floor(vlm, work, device)
    if options.plot:
        draw(options.plot, median, least, f"contrastive decoding, {TOKENS} tokens each, {device}")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {options.threads} threads",
        "vcd_s": round(median["vcd"][count], 3),
        "hf_batch_s": round(median["hf_batch"][count], 3),
        "ours_s": round(median["ours"][count], 3),
        "ratio_vcd": round(median["vcd"][count] / median["ours"][count], 2),
        "ratio_hf_batch": round(median["hf_batch"][count] / median["ours"][count], 2),
        "agreement": round(sum(equal) / len(equal), 4),
        "teacher_forced_records_per_s": round(teacher_forced(vlm, count), 2),
        "floor_s": round(least, 3),
        "peak_memory_bytes": peak,
    }


if __name__ == "__main__":
    main()
