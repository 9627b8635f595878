"""Kubeflow Pipelines components: thin, typed, one call each. Import as `qcore.components`."""
