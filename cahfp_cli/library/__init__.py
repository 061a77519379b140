"""The jobs that commands do, as functions of values; `cahfp_cli` itself offers them (docs/reference/api.md)."""
