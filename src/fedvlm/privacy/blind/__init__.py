"""Secure aggregation: the server gets the sum of at least three uploads, and no upload.

The protocol is the one with double masks of Bonawitz et al., CCS 2017, on a complete graph. Each
site signs with a long-lived key whose fingerprint its peers pin. No file here does any input or
output: :class:`client.Client` and :class:`collector.Collector` turn messages into messages.
"""
