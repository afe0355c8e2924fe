"""The engine started again, when its programs are on disk."""

from bench.gpu import engine
from bench.gpu.job import Job


def run(job: Job) -> None:
    engine.start(job, 0.9 * job.left).llm.close()
