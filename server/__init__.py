"""The service: HTTP, engines, policies and metrics around `probes`."""
