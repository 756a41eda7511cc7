"""The Kubernetes API: its objects decoded and validated, listed and watched; and the Events written there."""
