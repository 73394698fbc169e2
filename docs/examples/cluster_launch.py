"""The same run on a cluster: only the address changes. Here the cluster is three nodes on this machine.

    python cluster_launch.py

On real machines `ray start --head --port=6379` on one, `ray start --address=HEAD:6379` on the others, and the command
below on any of them with `--address auto`. Every node needs raywm's dependencies and the same token (RAY_AUTH_TOKEN);
raywm itself and the module of your environment travel along.
"""

import subprocess
import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        command = ["raywm.cli", "train", "cartpole", "--address", cluster.address, "collect.workers=2", *sys.argv[1:]]
        print("raywm", *command[1:])
        sys.exit(subprocess.run([sys.executable, "-m", *command], check=False).returncode)
    finally:
        cluster.shutdown()
