"""The wire protocol of E2B's SDKs, below /e2b (decision 51).

    /e2b/v2/sandboxes, /sandboxes, /snapshots, ...      control.py, state.py: the control plane
    /e2b/process.Process/..., /filesystem.Filesystem/   process.py, filesystem.py: Connect RPC (connect.py)
    /e2b/files, /health, /metrics, /envs                files.py: HTTP of the daemon in a sandbox
    /e2b/execute, /contexts                             interpreter.py: port 49999, the code interpreter
    any other port                                      ports.py

A request with the header E2b-Sandbox-Id is for a sandbox, any other one is for the control plane.
"""

from rock.dialects.e2b.mount import E2B as E2B
from rock.dialects.e2b.mount import PREFIX as PREFIX
from rock.dialects.e2b.state import Options as Options
