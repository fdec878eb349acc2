"""Loader, step, both together: where the time goes. Speed is measured here and never asserted in a test."""
