"""The forms of an export, by name."""

from enum import StrEnum


class Form(StrEnum):
    JSONL = "jsonl"
    PARQUET = "parquet"
    TRL = "trl"
    LLAMAFACTORY = "llamafactory"
    MS_SWIFT = "ms-swift"
    RLAIF_V = "rlaif-v"
