"""What people read: tables of plans and summaries."""
