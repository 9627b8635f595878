"""Kubeflow pipelines composed of `qcore.components`, and how to run them locally. Import as `qcore.pipelines`."""
