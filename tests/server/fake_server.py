"""`run` with the engine process of fake_core.py; the argument is the ServerConfig as JSON."""

import sys
from pathlib import Path

import msgspec

from jaxserve.config import ServerConfig, parse_mesh
from jaxserve.engine.replica import ProcessReplica
from jaxserve.server.main import run

if __name__ == "__main__":
    config = msgspec.json.decode(sys.argv[1], type=ServerConfig)
    command = (str(Path(__file__).with_name("fake_core.py")),)
    replicas = [ProcessReplica(i, config.log_level, command) for i in range(parse_mesh(config.mesh).data)]
    sys.exit(run(config, replicas))
