"""`mirl_dist` that saves inputs and outputs of every image that it restores, and torch's switches meanwhile.

In the folder MIRL_PIXELS: 00-in.npy, 00-out.npy and so on, in the order of restoration, and switches.json.
"""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirl_dist.cli import app
from mirl_dist.evaluation import evaluate

restore, numbers, folder = evaluate.restore, count(), Path(os.environ["MIRL_PIXELS"])


def restoring(model: Any, image: Any, *given: Any) -> Any:
    number, restored = next(numbers), restore(model, image, *given)
    np.save(folder / f"{number:02d}-in.npy", image)
    np.save(folder / f"{number:02d}-out.npy", restored)
    switches = {
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }
    (folder / "switches.json").write_text(json.dumps(switches))
    return restored


if __name__ == "__main__":
    evaluate.restore = restoring
    app.main()
