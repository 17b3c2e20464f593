"""Config sections about storing and operating a run; except for run.seed they do not define the experiment.

Sections about training, pruning and scoring are in schema_training.py. Each key has its unit, range and default here.
Keys marked `Local` (paths, logging, workers) do not affect numerical results. Each section checks itself for
contradictions; config.py checks for contradictions between sections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mirl_dist.config.yaml_loader import Node


class _Local:
    """Marker for keys that do not affect a run's numerical results."""


Local = _Local()
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class RunSection(Node):
    folder: Annotated[str, Local] = Field("runs/run", min_length=1)
    """Where all data of this run is stored: a folder, or s3://bucket/prefix."""
    seed: Seed = 0

    def inconsistencies(self) -> Iterator[str]:
        kind = self.folder.partition("://")[0]
        if kind not in ("s3", "file", self.folder):
            yield f"run.folder: found {kind}://; a run is stored in a folder or under s3://bucket/prefix"


class StoreSection(Node):
    """Access to the stores of the run and of its shards."""

    endpoint: Annotated[str | None, Local] = None
    """S3 server, http(s)://host:port. Null: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, the AWS profile, else AWS."""
    encryption: Annotated[Literal["AES256", "aws:kms"] | None, Local] = None
    """Server-side encryption of objects written to S3. Null: the bucket's default."""
    kms_key: Annotated[str | None, Local] = None
    """Key id or ARN for aws:kms. Null: the account's default key for S3."""
    patience_seconds: Annotated[PositiveFloat, Local] = 900
    """How long requests to an unavailable or full store are retried, counted from the last byte transferred. After that
    the run stops and can be resumed."""
    lease_seconds: Annotated[float, Field(ge=1), Local] = 60
    """A launch that has not renewed its lease for this long is considered dead; another may resume its run."""

    def inconsistencies(self) -> Iterator[str]:
        endpoint = self.endpoint or "http://"
        if not endpoint.startswith(("http://", "https://")) or "@" in endpoint or "?" in endpoint:
            yield "store.endpoint: found no plain address; write http(s)://host:port, keys belong into AWS's"
        if self.kms_key is not None and self.encryption != "aws:kms":
            yield "store.kms_key: found without store.encryption aws:kms; set that too, or remove the key"


class RanksSection(Node):
    timeout_seconds: Annotated[PositiveFloat, Local] = 1800
    """How long ranks wait for each other in a collective. After that missing ranks are named and the ranks exit."""
    restarts: Annotated[Count, Local] = 3
    """How often `train --launch` restarts the ranks after one of them died."""
    slow_factor: Annotated[float, Field(gt=1), Local] = 1.5
    """A rank is reported as a straggler if it repeatedly takes longer than the others to reach the all-reduce, by this
    factor."""
    logs: Annotated[str | None, Local] = None
    """Folder for the logs of ranks, such as rank-0003.jsonl. Null: logs/ inside a local run.folder; for s3:// a folder
    named after the run in mirl-dist below XDG_STATE_HOME or ~/.local/state."""


class PreemptSection(Node):
    deadline_seconds: Annotated[PositiveFloat, Local] = 120
    """Longest time from SIGTERM, SIGINT or SIGUSR1 to the exit of the process."""


class GuardSection(Node):
    skip_bad_batches: Annotated[Count, Local] = 0
    """How many global batches per round may have a non-finite loss or gradient: they are skipped, reported and counted
    in the ticket. 0: the first one stops the run."""
    spike_factor: Annotated[float | None, Field(gt=1), Local] = 10
    """Report a step whose loss exceeds this factor times the median of the previous 50 steps. Null: never."""
    same_step_failures: Annotated[PositiveInt, Local] = 3
    """How many launches on one machine may crash in the same step before the next launch refuses to retry it."""


class KeepSection(Node):
    rounds: Annotated[Literal["all", "best"], Local] = "all"
    """all: keep every round's weights. best: when the run ends, keep only those of the round with the best validation
    score."""
    by: Annotated[tuple[str, ...], Local] = ()
    """Globs of score names, `psnr/<task>/<set>`; the round with the best mean is kept. Required for rounds: best."""

    def inconsistencies(self) -> Iterator[str]:
        if self.rounds == "best" and not self.by:
            yield "keep.by: found nothing with keep.rounds best; name scores, for example ['psnr/*/valid']"


class CheckpointSection(Node):
    every_steps: Annotated[PositiveInt | None, Local] = 1000
    """Optimiser steps between commits. Null: commit only after a round's training and at the end of the round."""
    keep_last: Annotated[int, Field(ge=2), Local] = 2


class TrackingSection(Node):
    enabled: Annotated[bool, Local] = True
    uri: Annotated[str | None, Local] = None
    """Null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db. Give passwords in the environment only."""
    experiment: Annotated[str, Local] = "mirl_dist"
    run_name: Annotated[str | None, Local] = None
    tags: Annotated[dict[str, str], Local] = {}
    """Additional tags of the run in MLflow."""
    every_steps: Annotated[PositiveInt, Local] = 10
    journal: Annotated[str | None, Local] = None
    """Local folder for records until MLflow has received them. Null: inside a local run.folder; for s3:// in mirl-dist
    below XDG_CACHE_HOME or ~/.cache."""

    def inconsistencies(self) -> Iterator[str]:
        address = (self.uri or "").partition("://")[2]
        if "@" in address or "?" in address:
            yield "tracking.uri: found '@' or '?', which may hold credentials; use MLFLOW_TRACKING_URI instead"
