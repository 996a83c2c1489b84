"""How stages run: click CLI, config and presets, Ray jobs, demo and report. The only place that imports ray."""
