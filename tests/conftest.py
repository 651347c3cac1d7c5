"""pytest puts this folder on the path: tests of every tier may import `harness`, `engines` and `cluster_nodes`."""
