"""The `qcore` command: parse, call one step, print. The only place that prints or exits, besides the device's."""
