"""Ray Serve: the deployments, and how they find each other."""
