"""The contract of the gRPC door: `v1/*.proto` and the code generated from them.

The only package that server and client share. Regenerate with `python -m tests.protos.generate`.
"""
