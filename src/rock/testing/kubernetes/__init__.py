"""A fake Kubernetes cluster for tests, in this process.

    with FakeCluster(nodes=2) as cluster:
        subprocess.run(["kubectl", "--kubeconfig", cluster.kubeconfig, "get", "pods"])

The API server serves what kubectl and client libraries use. Pods run nothing, a real rocklet, or a rocklet with the
fake runtime. `faults` makes requests and watches fail. docs/guides/testing.md
"""

from rock.testing.kubernetes.api import Faults
from rock.testing.kubernetes.cluster import FakeCluster
from rock.testing.kubernetes.objects import KINDS, Kind, Objects, Refused

__all__ = ["KINDS", "FakeCluster", "Faults", "Kind", "Objects", "Refused"]
