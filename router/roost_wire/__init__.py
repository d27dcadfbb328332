"""The contract between router and replicas: block hashes, header names, load reports."""
