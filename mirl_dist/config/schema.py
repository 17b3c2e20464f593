"""Where and how a run is kept: the sections of a config that say nothing of the experiment (run.seed excepted).

What is trained, pruned and scored stands in schema_training.py. Each key has its unit, its range and its default here;
keys marked `Local` (places, logging, workers) do not change the numbers of a run. A section states what contradicts
within it; config.py, what contradicts between sections.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mirl_dist.config.yaml_loader import Node


class _Local:
    """Marks a key that does not change the numbers of a run."""


Local = _Local()
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class RunSection(Node):
    folder: Annotated[str, Local] = Field("runs/run", min_length=1)
    """Where everything of this run is kept: a folder, or s3://bucket/prefix."""
    seed: Seed = 0

    def inconsistencies(self) -> list[str]:
        kind = self.folder.partition("://")[0]
        if kind not in ("s3", "file", self.folder):
            return [f"run.folder: found {kind}://; runs are kept in folders and under s3://bucket/prefix"]
        return []


class StoreSection(Node):
    """How stores are talked to: of the run, and of its shards."""

    endpoint: Annotated[str | None, Local] = None
    """The S3 server, http(s)://host:port. Null: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, a profile, else AWS."""
    encryption: Annotated[Literal["AES256", "aws:kms"] | None, Local] = None
    """Server-side encryption of what is written to S3. Null: as the bucket says."""
    kms_key: Annotated[str | None, Local] = None
    """With aws:kms: the key's id or ARN. Null: the account's own key for S3."""
    patience_seconds: Annotated[PositiveFloat, Local] = 900
    """How long a store that is away or full is tried again, since the last byte that passed. After that a run stops,
    resumably."""
    lease_seconds: Annotated[float, Field(ge=1), Local] = 60
    """A launch without a sign of life for so long is dead, and another may go on with its run."""

    def inconsistencies(self) -> list[str]:
        texts = []
        endpoint = self.endpoint or "http://"
        if not endpoint.startswith(("http://", "https://")) or "@" in endpoint or "?" in endpoint:
            texts.append("store.endpoint: found no plain address; write http(s)://host:port, keys belong into AWS's")
        if self.kms_key is not None and self.encryption != "aws:kms":
            texts.append("store.kms_key: found without store.encryption aws:kms; set that too, or remove the key")
        return texts


class RanksSection(Node):
    timeout_seconds: Annotated[PositiveFloat, Local] = 1800
    """How long ranks wait for one another. After that those who did not come are named, and the ranks end."""
    restarts: Annotated[Count, Local] = 3
    """How often `train --launch` starts the ranks again after one of them died."""
    slow_factor: Annotated[float, Field(gt=1), Local] = 1.5
    """A rank that reaches the all-reduce later than the others by this factor, report after report, is named."""
    logs: Annotated[str | None, Local] = None
    """The folder in which each rank keeps a log, rank-0003.jsonl. Null: logs/ inside a run.folder that is a folder; for
    s3:// a folder named after the run below XDG_STATE_HOME or ~/.local/state/mirl-dist."""


class PreemptSection(Node):
    deadline_seconds: Annotated[PositiveFloat, Local] = 120
    """From SIGTERM, SIGINT or SIGUSR1 to the end of the process, at the latest."""


class GuardSection(Node):
    skip_bad_batches: Annotated[Count, Local] = 0
    """How many global batches of a round may have a loss or gradient that is not finite: they are left out, told and
    counted in the ticket. 0: the first one stops the run."""
    spike_factor: Annotated[float | None, Field(gt=1), Local] = 10
    """A step whose loss is so many times the median of the 50 before it is reported. Null: none is."""
    same_step_failures: Annotated[PositiveInt, Local] = 3
    """Launches on one machine that may die in one and the same step before the next one refuses to try it again."""


class KeepSection(Node):
    rounds: Annotated[Literal["all", "best"], Local] = "all"
    """best: at the end the run names the round with the best validation score and drops other rounds' weights."""
    by: Annotated[tuple[str, ...], Local] = ()
    """Globs of score names, `psnr/<task>/<set>`; their mean decides. Needed for rounds: best."""

    def inconsistencies(self) -> list[str]:
        if self.rounds == "best" and not self.by:
            return ["keep.by: found nothing with keep.rounds best; name scores, for example ['psnr/*/valid']"]
        return []


class CheckpointSection(Node):
    every_steps: Annotated[PositiveInt | None, Local] = 1000
    """Null: only when a round's training has ended, and at the end of the round."""
    keep_last: Annotated[int, Field(ge=2), Local] = 2


class TrackingSection(Node):
    enabled: Annotated[bool, Local] = True
    uri: Annotated[str | None, Local] = None
    """Null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db. Passwords belong into the environment."""
    experiment: Annotated[str, Local] = "mirl_dist"
    run_name: Annotated[str | None, Local] = None
    tags: Annotated[dict[str, str], Local] = Field(default_factory=dict)
    """Of the run in MLflow, beside those that it has anyway."""
    every_steps: Annotated[PositiveInt, Local] = 10
    journal: Annotated[str | None, Local] = None
    """The folder of this machine where records wait until MLflow has received them. Null: inside a run.folder that
    is a folder; for s3:// in mirl-dist below XDG_CACHE_HOME or ~/.cache."""

    def inconsistencies(self) -> list[str]:
        address = (self.uri or "").partition("://")[2]
        if "@" in address or "?" in address:
            return ["tracking.uri: found '@' or '?', which may hold credentials; use MLFLOW_TRACKING_URI instead"]
        return []
