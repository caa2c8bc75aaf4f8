"""Kubernetes: a small client of the API server, and sandboxes as pods. docs/decisions/0046-kubernetes.md"""
