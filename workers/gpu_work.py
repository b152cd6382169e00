"""The tasks of the GPU child: generate, finetune, score, see. Kept warm, no wires but the channel."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from hscr.config import EvaluateConfig, FinetuneConfig, GenerateConfig
from hscr.contrast.degrade import degrade
from hscr.contrast.dependence import Said, dropped_views, visual_dependence
from hscr.contrast.generate import Skipped, generate
from hscr.errors import JobCancelled, NotFound, ObjectStoreUnavailable
from hscr.evaluate.metrics import ACCURACY, MACRO, score, summarise
from hscr.evaluate.run import require_readable
from hscr.evaluate.suites import Suite, SuiteItem, load_suite
from hscr.learn.trainer import finetune
from hscr.models.encoder import Encoder
from hscr.models.language import View
from hscr.models.vlm import VLM
from hscr.records import Dropping, PreferenceRecord, PreferenceSource
from hscr.store.blobs import Blobs
from workers.checkpoints import Kept

_GREEDY_BATCH = 32
_GREEDY_TOKENS = 64


class Channel(Protocol):
    def send(self, event: str, **data: Any) -> None: ...

    def stopped(self) -> bool: ...

    def checkpoint_wanted(self) -> bool: ...


class Workbench:
    """One model on one device; what a task needs of its weights is loaded at the first one and stays."""

    def __init__(self, model: Path, device: str, dtype: str, blobs: Blobs, threads: int) -> None:
        torch.set_num_threads(threads)
        self._where = (model, device, dtype)
        self._blobs = blobs

    @cached_property
    def vlm(self) -> VLM:
        return VLM.load(*self._where)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder.load(*self._where)

    def run(self, task: str, arguments: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Raises HscrError; JobCancelled when the parent asked the task to stop."""
        tasks = {
            "generate": self._generate,
            "finetune": self._finetune,
            "score": self._score,
            "see": self._see,
        }
        return tasks[task](arguments, channel)

    def _generate(self, arguments: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Arguments: sources, config, adapter {name, digest} | None. Events: record, skip."""
        sources = [PreferenceSource.model_validate(source) for source in arguments["sources"]]
        config = GenerateConfig.parse(arguments["config"])
        with self._adapter(arguments["adapter"]) as adapter:
            pictured = self._pictured(sources, channel)
            for made in generate(self.vlm, pictured, config, adapter=adapter, should_stop=channel.stopped):
                if isinstance(made, Skipped):
                    channel.send("skip", source=made.source_id, reason=made.reason)
                else:
                    channel.send("record", record=made.model_dump(mode="json"))
        return {"model_digest": self.vlm.digest}

    def _pictured(
        self, sources: list[PreferenceSource], channel: Channel
    ) -> Iterator[tuple[PreferenceSource, Image.Image]]:
        for source in sources:
            try:
                yield source, self._image(source.image_digest)
            except NotFound:
                channel.send("skip", source=source.id, reason="Its image has expired or was deleted.")

    def _finetune(self, arguments: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Arguments: records (path of JSON lines), out, config, kept (the attempt's folder), every (steps).

        Events: progress; resumed (step) or refused (reason) when there is a checkpoint; unshared (reason)
        when one could not be left for other machines.
        """
        kept = Kept(Path(arguments["kept"]), self._blobs)

        def share() -> None:
            try:
                kept.share()
            except ObjectStoreUnavailable as error:  # the next one may get there; training needs no store
                channel.send("unshared", reason=error.detail)

        lines = Path(arguments["records"]).read_text().splitlines()
        records = [PreferenceRecord.model_validate_json(line) for line in lines]
        result = finetune(
            self.vlm,
            [(record, partial(self._image, record.image_digest)) for record in records],
            FinetuneConfig.parse(arguments["config"]),
            out_dir=arguments["out"],
            on_progress=lambda step, steps, metrics: channel.send(
                "progress", done=step, total=steps, metrics=metrics
            ),
            should_stop=channel.stopped,
            checkpoint_every=arguments["every"],
            checkpoint_dir=kept.steps,
            should_checkpoint=channel.checkpoint_wanted,
            on_checkpoint=share,
            resume=True,
            on_resumed=lambda step: channel.send("resumed", step=step),
            on_refused=lambda reason: channel.send("refused", reason=reason),
        )
        return {
            "metrics": result.metrics,
            "probe": result.probe,
            "warnings": result.warnings,
            "base_digest": self.vlm.digest,
        }

    def _score(self, arguments: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Arguments: versions [{name, digest} | None], evaluate. Events: scored, one per version.

        See `_score_version`.
        """
        config = EvaluateConfig.parse(arguments["evaluate"])
        suite = load_suite(config)
        require_readable(suite, self.vlm)
        for version in arguments["versions"]:
            body = self._score_version(version, suite, config, channel)
            channel.send("scored", version=version and version["name"], body=body)
        return {}

    def _score_version(
        self, version: dict[str, str] | None, suite: Suite, config: EvaluateConfig, channel: Channel
    ) -> dict[str, Any]:
        """Dependence of the true answers in nats by item id; accuracies in [0, 1] under one dropout mask."""
        items = _sample(suite, config)
        with self._adapter(version) as adapter:
            values = visual_dependence(
                self.vlm,
                [Said(item.image_digest, _picture(item), item.question, item.truth) for item in items],
                adapter=adapter,
                rate=config.drop_rate,
                masks=config.dependence_masks,
                seed=config.seed,
                should_stop=channel.stopped,
            )
            answers = self._answer_dropped(suite, config, adapter, channel)
        summary = summarise([score(item, text) for item, text in zip(suite.items, answers, strict=True)])
        dependence = {item.id: value for item, value in zip(items, values, strict=True)}
        return {
            "dependence": dependence,
            "visual_dependence": sum(values) / len(values),
            "macro_score_dropped": summary[MACRO],
            "accuracy_dropped": summary[ACCURACY],
        }

    def _answer_dropped(
        self, suite: Suite, config: EvaluateConfig, adapter: str | None, channel: Channel
    ) -> list[str]:
        """Greedy answers to every question with one fixed mask per image, the same for every version."""
        answers: list[str] = []
        for start in range(0, len(suite.items), _GREEDY_BATCH):
            if channel.stopped():
                raise JobCancelled(f"Stopped after {start} questions.", remedy="Submit the job again.")
            batch = suite.items[start : start + _GREEDY_BATCH]
            tokens = self.vlm.encode({item.image_digest: _picture(item) for item in batch})
            views = [
                degrade(tokens[item.image_digest], config.drop_rate, "delete", item.image_digest, config.seed)
                for item in batch
            ]
            with self.vlm.use(adapter), torch.inference_mode():
                prefix = self.vlm.embed([self.vlm.prompt_ids(item.question) for item in batch], views)
                answers += self.vlm.generate_greedy(self.vlm.prefill(prefix), _GREEDY_TOKENS)
        return answers

    def _see(self, arguments: dict[str, Any], channel: Channel) -> dict[str, Any]:  # noqa: ARG002
        """Arguments: image (digest), question, text, dropping, out (folder for the files).

        Visual tokens of the image, whole and then under each mask, as files that `torch.load` reads; and the
        token ids that an engine reads of the question, its image expanded, and of the text, its end left out.
        The language model is not loaded for this.
        """
        encoder, digest = self.encoder, arguments["image"]
        dropping = Dropping.model_validate(arguments["dropping"])
        prompt = encoder.prompt_ids(arguments["question"])
        answer = encoder.completion_ids(arguments["text"])[:-1]
        (tokens,) = encoder.encode({digest: self._image(digest)}).values()
        views = [View.whole(tokens), *dropped_views(tokens, digest, **dropping.model_dump())]
        files = [_saved(view.tokens, Path(arguments["out"]), f"{i}.pt") for i, view in enumerate(views)]
        return {
            "files": files,
            "rows": len(tokens),
            "prompt": encoder.expanded(prompt),
            "answer": answer,
            "image_token": encoder.image_token_id,
            "texts": [encoder.tokenizer.decode([token]) for token in answer],
            "content": encoder.vocabulary.content[answer].tolist(),
            "model_digest": encoder.digest,
            "numeric_mode": encoder.numeric_mode,
        }

    @contextmanager
    def _adapter(self, version: dict[str, str] | None) -> Iterator[str | None]:
        """Load a version from the store for as long as it is needed; None is the base model."""
        if version is None:
            yield None
            return
        self.vlm.load_adapter(self._blobs.folder(version["digest"]), version["name"])
        try:
            yield version["name"]
        finally:
            self.vlm.unload_adapter(version["name"])

    def _image(self, digest: str) -> Image.Image:
        return Image.open(io.BytesIO(self._blobs.get(digest)))


def _sample(suite: Suite, config: EvaluateConfig) -> list[SuiteItem]:
    """The questions scored for dependence: drawn once per seed, the same for every version."""
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(suite.items), generator=generator)[: config.dependence_questions]
    return [suite.items[index] for index in sorted(order.tolist())]


def _saved(tokens: Tensor, folder: Path, name: str) -> str:
    """The file's name. A copy is saved: a view would be written with all it is a view of."""
    torch.save(tokens.detach().cpu().clone(), folder / name)
    return name


def _picture(item: SuiteItem) -> Image.Image:
    return Image.open(io.BytesIO(item.image_png))
