"""Runs a Ray cluster of two raylets with one CPU each until its standard input ends."""

import sys

import ray
from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**28}
    )
    cluster.add_node(num_cpus=1, object_store_memory=2**28)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
    ray.shutdown()
