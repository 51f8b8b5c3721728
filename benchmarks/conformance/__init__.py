"""A conformance suite for any server of the Open Inference Protocol v2, pointed at by URL."""
