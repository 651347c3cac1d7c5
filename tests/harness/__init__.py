"""Clusters that fail: real nodes on real lease engines, faults, clients that write down what they see, a checker."""
