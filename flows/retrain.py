"""The flow that turns newest data into a candidate and, if the gate lets it pass, a champion.

A thin order of tasks: every decision is made in the rooms. One retrain at a time per workload, whoever asks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.single import single_flight
from flows.site import Site, now_of
from monitoring.drift import calibrate
from noria.records import DatasetRef, Verdict, Version, Window
from noria.workload import Workload
from registry.bundle import Contents
from registry.gate import Contest, judge, report
from registry.promote import promote
from registry.store import Store
from training.fit import Trained, fit
from training.score import score
